"""Which tokens an engine computes in which step: a step's number of tokens is the M that every kernel sees.

The policy is that of vLLM's V1 scheduler: first come, first served, one budget of tokens per step, sequences that decode and
sequences that still prefill treated alike. A step holds the tokens that vLLM's would; in which order their rows stand vLLM
decides by slots that finished requests leave, so that with several sequences at once a row's place can be another one there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qlab.errors import QlabError


class Span(NamedTuple):
    """Tokens ``start:stop`` of one sequence, fed to the model in one step."""

    sequence: int
    start: int
    stop: int


Step = tuple[Span, ...]
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Batching:
    """How prompts share steps."""

    budget: int = 50
    """Most tokens of one step: longer prompts are prefilled in chunks."""
    together: int = 1
    """Sequences that are in the batch at once."""

    def steps(self, prompts: Sequence[int], fed: Sequence[int]) -> Steps:
        """Steps for sequences of ``prompts`` tokens known at the start and ``fed`` in all (the last sampled one is not fed).

        Raises QlabError for a budget that cannot hold one token of every running sequence.
        """
        if self.together < 1 or self.budget < self.together:
            raise QlabError(f"a budget of {self.budget} tokens per step cannot serve {self.together} sequences at once")
        done = [0] * len(fed)
        running: list[int] = []
        waiting = [s for s, n in enumerate(fed) if n]
        steps: list[Step] = []
        while running or waiting:
            left, step = self.budget, []
            for s in (*running, *waiting[: self.together - len(running)]):
                known = prompts[s] if done[s] < prompts[s] else done[s] + 1
                count = min(known - done[s], left)
                if not count:
                    break
                step.append(Span(s, done[s], done[s] + count))
                done[s] += count
                left -= count
            started = [span.sequence for span in step if span.sequence in waiting]
            waiting = [s for s in waiting if s not in started]
            running = [s for s in (*running, *started) if done[s] < fed[s]]
            steps.append(tuple(step))
        return tuple(steps)


def size(step: Step) -> int:
    """Tokens of a step: the M of its kernels."""
    return sum(span.stop - span.start for span in step)
