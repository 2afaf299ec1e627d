"""From two paths and a text to each layer's part of their divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlab import environment
from qlab.engine.path import Path
from qlab.errors import QlabError
from qlab.layers import coordinates, score
from qlab.layers.measure import gap
from qlab.layers.pair import A, B, Pair
from qlab.layers.response import responses
from qlab.layers.result import SCHEMA, LayersResult
from qlab.layers.walk import Advance, By, check_by, forward, swaps_of, work


@dataclass(frozen=True)
class Plan:
    """What is asked about a pair."""

    tokens: tuple[int, ...]
    """Token ids of the text, one prefill step."""
    by: By = "linear"
    """What is swapped at once: a linear, or all of a decoder layer."""
    singles: bool = True
    top_k: int = 5
    """Log-probabilities compared per row, at the ids that A finds most probable; 0 takes the whole vocabulary."""
    seed: int = 0
    """Of the order of replayed atomics."""


def check_tokens(count: int, paths: Sequence[Path]) -> None:
    """Raise QlabError where a path leaves its INT4 kernel for so many tokens of a step."""
    for path in paths:
        if path.chunk and count > path.chunk:
            raise QlabError(
                f"--tokens {count}: {path} leaves its INT4 kernel for cuBLAS above {path.chunk} tokens of a step; name fewer"
            )


def steps(pair: Pair, plan: Plan) -> int:
    """Runs of a decoder layer that :func:`run` takes."""
    return work(pair, swaps_of(pair, plan.by), plan.singles) + 2 * pair.a.blocks.depth


def run(
    pair: Pair,
    plan: Plan,
    *,
    words: Sequence[str] = (),
    arguments: Mapping[str, str] | None = None,
    advance: Advance = lambda n: None,
) -> LayersResult:
    """``words`` are the tokens as text.

    Raises QlabError for a plan that the model cannot serve, UnsupportedError where a linear cannot run here.
    """
    started = time.perf_counter()
    check(pair, plan)
    swaps = swaps_of(pair, plan.by)
    with pair.a.blocks.threads():
        walked = forward(pair, plan.tokens, swaps, singles=plan.singles, seed=plan.seed, advance=advance)
        found = score.scores(pair, walked, swaps, plan.top_k)
        linear = responses(pair, plan.tokens, walked, swaps, found.ids, found.b, plan.seed, advance)
    rows = score.swap_rows(swaps, found, linear, plan.singles)
    by_row = score.by_row(found.b)
    total = math.fsum(by_row)
    singles = [r.single for r in rows if r.single is not None]
    files = [side.blocks.files for side in pair.sides]
    return LayersResult(
        schema=SCHEMA,
        arguments=dict(arguments or {}),
        environment=environment.collect(details=False),
        paths=(str(pair.a.path), str(pair.b.path)),
        checkpoints=(files[A].describe(), files[B].describe()),
        dtype=str(pair.dtype).removeprefix("torch."),
        scales=coordinates.how(pair),
        tokens=tuple(words) or tuple(map(str, plan.tokens)),
        top_k=plan.top_k,
        total=total,
        residual=float(score.residual(rows, total)),
        total_by_token=tuple(by_row),
        linears=walked.linears,
        stream=walked.stream,
        swaps=rows,
        singles=(math.fsum(singles) / total if total else 0.0) if plan.singles else None,
        singles_gap=gap(singles, [r.share for r in rows]) if plan.singles else None,
        response=math.fsum(r.response for r in rows),
        response_gap=gap([r.response for r in rows], [r.projection for r in rows]),
        seconds=round(time.perf_counter() - started, 1),
    )


def check(pair: Pair, plan: Plan) -> None:
    """Raise QlabError for a plan that the model cannot serve, before any work."""
    check_by(plan.by)
    count, blocks = len(plan.tokens), pair.a.blocks
    if not count:
        raise QlabError("there is no token to run; name one or more")
    if count > blocks.longest:
        raise QlabError(f"--tokens {count}: the model takes {blocks.longest}; name fewer")
    check_tokens(count, [side.path for side in pair.sides])
    if not 0 <= plan.top_k <= blocks.vocabulary:
        raise QlabError(f"--top-k {plan.top_k}: the model has {blocks.vocabulary} token ids; name so many or fewer, 0 for all")
    if plan.seed < 0:
        raise QlabError(f"--seed {plan.seed}: it must be 0 or more")
    bad = next((t for t in plan.tokens if not 0 <= t < blocks.vocabulary), None)
    if bad is not None:
        raise QlabError(
            f"token {bad} is not in the vocabulary of {blocks.vocabulary} ids; tokenizer and model belong to different models"
        )
