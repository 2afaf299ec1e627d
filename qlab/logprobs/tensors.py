"""A trace's tensors to safetensors bytes and back, each checked against the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qlab.engine.run import Row, Run, Scored, Tap
from qlab.engine.schedule import Span, Step, Steps
from qlab.errors import QlabError
from qlab.logprobs.manifest import Lengths, Manifest, input_digest
from qlab.weights import DTYPES


class Sequences(NamedTuple):
    """What ``sequences.safetensors`` holds."""

    sequences: tuple[Scored, ...]
    steps: Steps


def pack_sequences(run: Run, m: Manifest) -> bytes:
    """The file's bytes. Ids of a whole vocabulary in order are left out."""
    whole = m.columns if m.request.top_k == 0 else 0
    tensors = {}
    for i, s in enumerate(run.sequences):
        if whole and not bool((s.ids[:, :whole] == torch.arange(whole, device=s.ids.device)).all()):
            raise QlabError(f"sequence {i}: with top_k 0 the ids must be the whole vocabulary in order")
        tensors[f"{i}.tokens"] = _narrow(s.tokens)
        tensors[f"{i}.ids"] = _narrow(s.ids[:, whole:])
        tensors[f"{i}.logprobs"] = _plain(s.logprobs)
        if s.digests is not None:
            tensors[f"{i}.digests"] = _plain(s.digests)
    spans = [(n, *span) for n, step in enumerate(run.steps) for span in step]
    tensors["steps"] = torch.tensor(spans, dtype=torch.int64).reshape(-1, 4)
    return save(tensors)


def unpack_sequences(raw: bytes, m: Manifest, where: str) -> Sequences:
    """Inverse of :func:`pack_sequences`. Raises QlabError naming file and tensor, and what is wrong with it."""
    t = _Tensors(raw, where)
    if not m.sequences:
        raise QlabError(f"{where}: the manifest has no sequence")
    found = tuple(_sequence(t, m, i, n) for i, n in enumerate(m.sequences))
    prompts = tuple(tuple(s.tokens[: s.prompt].tolist()) for s in found)
    if input_digest(prompts) != m.inputs:
        raise QlabError(f"{where}: the prompts' token ids are not those of the manifest's input digest")
    steps = _steps(t.take("steps", torch.int64, (None, 4)), m, where)
    t.end()
    return Sequences(found, steps)


def _sequence(t: _Tensors, m: Manifest, i: int, n: Lengths) -> Scored:
    if n.prompt < 1 or n.wanted < 0 or n.tokens != n.prompt + m.request.new_tokens or n.tokens < 2:
        raise QlabError(
            f"{t.where}: sequence {i} has {n.tokens} tokens, {n.prompt} of them its prompt's, and {m.request.new_tokens} new "
            "ones, which does not add up"
        )
    rows, k = n.tokens - 1, m.columns
    tokens = t.ids(f"{i}.tokens", (n.tokens,), m.model.vocabulary)
    stored = n.wanted + (k if m.request.top_k else 0)
    ids = t.ids(f"{i}.ids", (rows, stored), m.model.vocabulary)
    if not m.request.top_k:
        every = torch.arange(k).expand(rows, k)
        ids = torch.cat([every, ids], 1) if n.wanted else every
    logprobs = t.take(f"{i}.logprobs", torch.float32, (rows, k + n.wanted))
    _check_logprobs(logprobs, ids, m, f"{t.where}: {i}.logprobs")
    digests = t.take(f"{i}.digests", torch.int64, (len(m.linears), rows)) if m.digests else None
    return Scored(tokens, n.prompt, ids, logprobs, digests)


def _check_logprobs(logprobs: Tensor, ids: Tensor, m: Manifest, what: str) -> None:
    k = m.columns
    top, wanted = logprobs[:, :k], logprobs[:, k:]
    if not bool(torch.isfinite(top).all()):
        raise QlabError(f"{what} has NaN or an infinity among the top-k")
    if bool(torch.isinf(wanted).any()):
        raise QlabError(f"{what} has an infinity")
    if bool((logprobs > 0).any()):
        raise QlabError(f"{what} has a log-probability above 0")
    if m.request.top_k:
        if bool((top[:, 1:] > top[:, :-1]).any()):
            raise QlabError(f"{what} has a row whose top-k are not in descending order")
        chosen = ids[:, :k].sort(1).values
        if bool((chosen[:, 1:] == chosen[:, :-1]).any()):
            raise QlabError(f"{what} has a row that names one id twice among the top-k")


def _steps(t: Tensor, m: Manifest, where: str) -> Steps:
    steps: list[Step] = []
    for n, sequence, start, stop in t.tolist():
        # A step without spans cannot be, so the numbers count up without a gap.
        known = 0 <= sequence < len(m.sequences)
        if not (known and n >= 0 and len(steps) - 1 <= n <= len(steps) and 0 <= start < stop < m.sequences[sequence].tokens):
            raise QlabError(f"{where}: steps has the span {[n, sequence, start, stop]}, which no batch of these sequences has")
        if n == len(steps):
            steps.append(())
        steps[-1] += (Span(sequence, start, stop),)
    return tuple(steps)


def pack_rows(rows: Sequence[Row]) -> bytes:
    """The tapped rows' bytes, stacked per linear."""
    tensors = {}
    for linear in dict.fromkeys(r.tap.linear for r in rows):
        mine = [r for r in rows if r.tap.linear == linear]
        for side in ("x", "y"):
            parts = [getattr(r, side) for r in mine]
            if len({p.shape for p in parts}) > 1:
                raise QlabError(f"tapped rows of {linear} differ in length; the engine reported another linear's row")
            tensors[f"{side}.{linear}"] = _plain(torch.stack(parts))
    return save(tensors)


def unpack_rows(raw: bytes, m: Manifest, where: str) -> tuple[Row, ...]:
    """Inverse of :func:`pack_rows`. Raises QlabError naming file and tensor."""
    t = _Tensors(raw, where)
    counts: dict[str, int] = {}
    for tap in m.taps:
        counts[tap.linear] = counts.get(tap.linear, 0) + 1
    dtype = DTYPES[m.dtype]
    x = {name: iter(t.take(f"x.{name}", dtype, (n, None))) for name, n in counts.items()}
    y = {name: iter(t.take(f"y.{name}", dtype, (n, None))) for name, n in counts.items()}
    t.end()
    rows = []
    for tap in m.taps:
        place = f"{where}: the tap of {tap.linear} at sequence {tap.sequence}, position {tap.position}"
        if not (0 <= tap.sequence < len(m.sequences) and 0 <= tap.position < m.sequences[tap.sequence].tokens - 1):
            raise QlabError(f"{place} is no token that was fed")
        if not 0 <= tap.row < tap.M:
            raise QlabError(f"{place} is row {tap.row} of {tap.M}")
        key = Tap(tap.linear, tap.sequence, tap.position)
        rows.append(Row(key, tap.row, tap.M, tap.kernel, next(x[tap.linear]), next(y[tap.linear])))
    return tuple(rows)


class _Tensors:
    """A safetensors file's tensors, each taken once with its dtype and shape checked."""

    def __init__(self, raw: bytes, where: str) -> None:
        self.where = where
        try:
            self._left: dict[str, Tensor] = load(raw)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as e:
            raise QlabError(f"{where} is no safetensors file ({e}); copy the trace again") from None

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
        if name not in self._left:
            raise QlabError(f"{self.where}: tensor {name!r} is missing")
        t = self._left.pop(name)
        fits = t.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, t.shape, strict=True))
        if t.dtype != dtype or not fits:
            wanted = f"{str(dtype).removeprefix('torch.')} {['any' if n is None else n for n in shape]}"
            found = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise QlabError(f"{self.where}: tensor {name!r} is {found}, not {wanted}")
        return t

    def ids(self, name: str, shape: tuple[int, ...], vocabulary: int) -> Tensor:
        t = self.take(name, torch.int32, shape).long()
        if bool(((t < 0) | (t >= vocabulary)).any()):
            raise QlabError(f"{self.where}: tensor {name!r} has an id outside 0 to {vocabulary - 1}")
        return t

    def end(self) -> None:
        if self._left:
            raise QlabError(f"{self.where}: tensor {sorted(self._left)[0]!r} is no part of a trace")


def _narrow(ids: Tensor) -> Tensor:
    small = ids.to(torch.int32)
    if not torch.equal(small.to(ids.dtype), ids):
        raise QlabError("a token id needs more than 32 bits; the engine reported something else as an id")
    return _plain(small)


def _plain(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous()
