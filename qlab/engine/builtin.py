"""qlab's own engine: transformers' Llama in float64 around one kernel per linear, native or replayed.

Norms, rotary embedding, attention, softmax, the residual stream and the head are float64, and what enters a linear is rounded
once: two machines give the same numbers except where a value lies within some 1e-13 of a rounding border. Tokens are chosen
from log-probabilities as they are reported, in float32.
"""

from __future__ import annotations

import copy
from pathlib import Path as File

import torch
import transformers
from torch import Tensor

from qlab import hardware
from qlab.backends import dispatch
from qlab.engine import sampling
from qlab.engine.attention import Cache, Placed
from qlab.engine.collect import Collector
from qlab.engine.flip import Flip
from qlab.engine.llama import Llama
from qlab.engine.path import Path
from qlab.engine.request import check
from qlab.engine.run import Advance, Request, Run, Scored
from qlab.engine.schedule import Step, size
from qlab.errors import CheckpointError, UnsupportedError
from qlab.lab.model_files import ModelFiles

SOURCES = {"awq": ("awq", "unquantised"), "gptq": ("gptq", "compressed-tensors", "unquantised")}
"""Methods of checkpoints that vLLM's labels of a family run; an unquantised model is rounded to nearest for either."""


def check_family(files: ModelFiles, path: Path) -> None:
    """Raise CheckpointError where vLLM does not run such a checkpoint under the path's label."""
    if path.method in dispatch.LABELS and files.method not in SOURCES[path.source]:
        raise CheckpointError(
            f"{files.directory}: a checkpoint of {files.method}, which vLLM does not run as {path.method}; "
            f"name one of {path.source}"
        )


def runs_natively(path: Path, device: torch.device, native: bool | None) -> bool:
    """Whether the path's kernels run natively on ``device``: where its GPU has the arithmetic of the path's, unless ``native``
    is False. Raises UnsupportedError where ``native`` is True and cannot be had.
    """
    here = hardware.detect() if device.type == "cuda" else None
    same = here is not None and here.same_arithmetic(hardware.gpu(path.gpu))
    if native and not same:
        there = "on the CPU" if here is None else f"on this GPU ({here.key})"
        raise UnsupportedError(f"{path}: its kernels do not run natively {there}; leave native out to replay them")
    return same and native is not False


class Builtin:
    """The model in ``directory`` on ``path``, its tensors on ``device``.

    ``native`` None runs kernels natively where this machine's GPU has the arithmetic of the path's, and replays elsewhere; True
    insists on native ones, False replays. ``flip`` moves elements of attention's outputs.
    Raises CheckpointError for a directory that holds no such model, UnsupportedError where ``native`` cannot be had.
    """

    name = "builtin"

    def __init__(
        self,
        directory: File,
        path: Path,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float16,
        native: bool | None = None,
        flip: Flip | None = None,
    ) -> None:
        device = torch.device(device)
        self.directory, self.path, self.device, self.dtype, self.flip = directory, path, device, dtype, flip
        self.native = runs_natively(path, device, native)
        """Whether kernels run natively, where they can."""
        files = ModelFiles(directory, dtype)
        check_family(files, path)
        self.model = Llama(files, path, device, native if self.native else False)

    def moved(self, flip: Flip) -> Builtin:
        """The same engine, its tensors shared, with attention's outputs moved."""
        other = copy.copy(self)
        other.flip = flip
        return other

    def run(self, request: Request, advance: Advance = lambda tokens: None) -> Run:
        """Raises UnsupportedError before any work where a step cannot be computed here, QlabError for a bad request."""
        model, names = self.model, tuple(self.model.linears)
        check(request, model.vocabulary, model.longest, names)
        lengths = [len(p) for p in request.prompts]
        fed = [n + request.new_tokens - 1 for n in lengths]
        steps = request.batching.steps(lengths, fed)
        for m in sorted({size(step) for step in steps}, reverse=True):  # what is opaque is so for many tokens
            for linear in model.linears.values():
                linear.form(m)
        sequences = [_Sequence(request, i, fed[i]) for i in range(len(fed))]
        seen = Collector(request, names, fed, self.flip)
        with model.watched(seen, request.seed):
            for step in steps:
                seen.begin(step)
                self._step(request, step, sequences)
                advance(size(step))
        return Run(
            tuple(s.scored(seen.digests[s.index] if seen.digests else None) for s in sequences),
            steps,
            seen.calls(),
            seen.rows(),
            names,
            self._notes(),
        )

    def _step(self, request: Request, step: Step, sequences: list[_Sequence]) -> None:
        placed, tokens, row = [], [], 0
        for span in step:
            s = sequences[span.sequence]
            if s.cache is None:
                s.cache = self.model.cache(s.fed)
            placed.append(Placed(row, span.start, span.stop, s.cache))
            tokens += s.tokens[span.start : span.stop]
            row += span.stop - span.start
        exact = self.model.step(tokens, placed)
        if bool(exact.isnan().any()):
            raise UnsupportedError(
                f"{self.path}: a log-probability is not a number in sequences {sorted({s.sequence for s in step})}: "
                f"a linear left the range of {str(self.dtype).removeprefix('torch.')}; run the model in another dtype"
            )
        reported = exact.float()
        for span, p in zip(step, placed, strict=True):
            place = slice(p.row, p.row + span.stop - span.start)
            sequences[span.sequence].keep(span.start, exact[place], reported[place])

    def _notes(self) -> dict[str, str]:
        flip = {} if self.flip is None else {"flip": f"{self.flip.share} of attention's outputs, seed {self.flip.seed}"}
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        } | flip


class _Sequence:
    """A sequence on its way: its tokens so far, and what is known of its rows."""

    def __init__(self, request: Request, index: int, fed: int) -> None:
        self.request, self.index, self.fed = request, index, fed
        self.tokens = list(request.prompts[index])
        self.cache: Cache | None = None
        self._ids: list[Tensor] = []
        self._logprobs: list[Tensor] = []

    def keep(self, start: int, exact: Tensor, reported: Tensor) -> None:
        """Rows from ``start`` on, float64 and float32 [rows, V]; behind the last known token the next one is chosen."""
        r = self.request
        rows, size = reported.shape
        count = min(r.top_k, size) or size
        ids = sampling.largest(reported, count) if r.top_k else torch.arange(size, device=reported.device).repeat(rows, 1)
        if r.wanted is not None:
            wanted = r.wanted[self.index][start : start + rows].to(reported.device)
            ids = torch.cat((ids, wanted), 1)
        self._ids.append(ids.cpu())
        self._logprobs.append(reported.gather(1, ids).cpu())
        known = len(self.tokens)
        if start + rows == known:
            self.tokens.append(self._next(known, exact[-1], reported[-1:]))
        if start + rows == self.fed:
            self.cache = None

    def _next(self, position: int, exact: Tensor, reported: Tensor) -> int:
        r = self.request
        if r.forced is not None:
            return r.forced[self.index][position - len(r.prompts[self.index])]
        if r.sampling.temperature:
            return sampling.draw(exact, r.sampling, r.first + self.index, position)
        return int(sampling.largest(reported, 1))

    def scored(self, digests: Tensor | None) -> Scored:
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        return Scored(tokens, len(self.request.prompts[self.index]), torch.cat(self._ids), torch.cat(self._logprobs), digests)
