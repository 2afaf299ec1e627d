"""How far a re-execution's log-probabilities lie from its generator's, over the ids that the generator listed.

Differences are taken in float64. The generator is the first argument everywhere: its ids are compared, so that distances are
not symmetric.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qlab.engine.run import Scored
from qlab.errors import QlabError

Rows = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """One sequence under a generator and a re-executor, row by row."""

    distances: Tensor
    """float64 [rows]: L2 norm of the differences over the generator's top-k ids."""
    identical: Tensor
    """bool [rows]: every one of those log-probabilities is listed by both and has equal bits."""
    flips: Tensor
    """bool [rows]: the most probable token is another one."""
    largest: Tensor
    """float64 [rows]: largest absolute difference."""
    unlisted: Tensor
    """int64 [rows]: ids of the generator that the re-executor did not list; the smallest value of its top-k stands in."""
    values: Tensor
    """float64 [rows, k]: the re-executor's log-probabilities at the generator's ids."""


def compare(a: Scored, b: Scored, *, top_k: int | None = None, decimals: int | None = None) -> Comparison:
    """The re-executor ``b`` against the generator ``a``, over the ``top_k`` most probable ids of each row of ``a``.

    Args:
        top_k: without it, every id that ``a`` lists; needed where ``a`` lists wanted ids behind its top-k.
        decimals: round both sides' log-probabilities first, as an API does.

    Where ``b`` does not list an id, its smallest top-k value stands in, which is at least what ``b`` computed. A NaN of ``a``,
    or in the top-k of ``b``, makes its row NaN.

    Raises QlabError where the two hold other tokens, or ``a`` lists too few ids or one id twice.
    """
    if not torch.equal(a.tokens, b.tokens):
        raise QlabError("the two sequences hold other tokens: only a re-execution of the same tokens has comparable rows")
    return _compare(a, b, top_k, decimals)


def _compare(a: Scored, b: Scored, top_k: int | None, decimals: int | None) -> Comparison:
    ids, logp = _top(a, top_k)
    if len(ids) and bool((ids.sort(1).values.diff(dim=1) == 0).any()):
        raise QlabError("a row lists one id twice: wanted ids stand behind the top-k; name top_k")
    values, listed = _look_up(b, ids)
    mine_ids, mine = _top(b, None)
    rest = mine[:, : _descending(mine)].amin(1, keepdim=True)
    other = torch.where(listed, values, rest)
    if decimals is not None:
        logp, other = torch.round(logp, decimals=decimals), torch.round(other, decimals=decimals)
    d = torch.where(logp == other, 0.0, (logp - other).abs())  # equal infinities have no difference
    return Comparison(
        distances=d.square().sum(1).sqrt(),
        identical=((logp == other) & listed).all(1),
        flips=ids[:, 0] != mine_ids[:, 0],
        largest=d.amax(1),
        unlisted=(~listed).sum(1),
        values=other,
    )


def row_distances(a: Scored, b: Scored, *, top_k: int | None = None, decimals: int | None = None) -> Tensor:
    """float64 [rows]: d_r of each row, as :func:`compare` takes it."""
    return compare(a, b, top_k=top_k, decimals=decimals).distances


def sequence_distance(
    a: Scored, b: Scored, rows: Rows = "all", *, top_k: int | None = None, decimals: int | None = None
) -> float:
    """Root of the sum of d_r^2 over ``a``'s rows: all, those of its prompt (prefilled), or the generated (decoded) ones.

    Infinite where the tokens split apart after the prompt; rows of the prompt are compared all the same.

    Raises QlabError where the prompts differ, and as :func:`compare` does.
    """
    if rows not in get_args(Rows):
        raise QlabError(f"rows {rows!r} is none of {', '.join(get_args(Rows))}")
    prompt = min(a.prompt, b.prompt)
    if not torch.equal(a.tokens[:prompt], b.tokens[:prompt]):
        raise QlabError("the two sequences begin with other prompts: nothing of them can be compared")
    if not torch.equal(a.tokens, b.tokens):
        if rows != "prompt":
            return math.inf
        a, b = _first(a, prompt), _first(b, prompt)
    return norm(_compare(a, b, top_k, decimals).distances[chosen(a, rows)])


def norm(distances: Tensor) -> float:
    """Distance of a sequence from its rows' distances: the root of the sum of their squares."""
    return math.sqrt(float(distances.square().sum()))


def chosen(a: Scored, rows: Rows) -> slice:
    """Which rows of ``a`` are meant: those from ``a.prompt`` on were decoded."""
    return {"all": slice(None), "prompt": slice(a.prompt), "generated": slice(a.prompt, None)}[rows]


def _first(a: Scored, rows: int) -> Scored:
    return Scored(a.tokens[:rows], a.prompt, a.ids[:rows], a.logprobs[:rows])


def distances(
    a: Sequence[Scored], b: Sequence[Scored], rows: Rows = "all", *, top_k: int | None = None, decimals: int | None = None
) -> Tensor:
    """float64 [sequences]: :func:`sequence_distance` of each pair. Raises QlabError, naming the sequence."""
    if len(a) != len(b):
        raise QlabError(f"{len(a)} sequences cannot be compared with {len(b)}: re-execute all of them")
    found = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        try:
            found.append(sequence_distance(x, y, rows, top_k=top_k, decimals=decimals))
        except QlabError as e:
            raise QlabError(f"sequence {i}: {e}") from None
    return torch.tensor(found, dtype=torch.float64)


def fingerprint(sequences: Iterable[Scored], *, top_k: int | None = None, decimals: int | None = None) -> str:
    """sha256 over tokens, top-k ids and the bits of their (rounded) log-probabilities: equal where nothing can differ."""
    h = hashlib.sha256()
    for s in sequences:
        ids, logp = _top(s, top_k)
        logp = logp if decimals is None else torch.round(logp, decimals=decimals)
        h.update(repr((tuple(s.tokens.shape), tuple(ids.shape))).encode())
        for t in (s.tokens, ids, logp):
            h.update(t.contiguous().numpy().tobytes())
    return h.hexdigest()


def _descending(logp: Tensor) -> int:
    """Leading columns that fall in every row: the top-k, behind which wanted ids begin with a larger value or a NaN."""
    falls = (logp[:, 1:] <= logp[:, :-1]).all(0).long().cumprod(0)
    return 1 + int(falls.sum())


def _listed(s: Scored) -> int:
    return s.ids.shape[1]


def _vocabulary(s: Scored) -> int:
    """Columns in order of ids, where a sequence keeps the whole vocabulary; 0 where it keeps the top-k."""
    ordered = (s.ids == torch.arange(_listed(s))).all(0).long().cumprod(0)
    count = int(ordered.sum())
    return count if count > 1 else 0


def _top(s: Scored, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Ids [rows, k] and float64 log-probabilities [rows, k] of the k most probable tokens, the most probable first."""
    whole = _vocabulary(s)
    have = whole or _listed(s)
    k = have if top_k is None else top_k
    if not 1 <= k <= have:
        raise QlabError(f"top_k {k}: a row lists {have} log-probabilities; name a number from 1 to {have}")
    ids, logp = s.ids[:, :have], s.logprobs[:, :have].double()
    if whole:
        logp, order = logp.sort(dim=1, descending=True, stable=True)  # the smaller id first among equals
        ids = ids.gather(1, order)
    return ids[:, :k], logp[:, :k]


def _look_up(s: Scored, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``ids`` [rows, k], float64, and whether the sequence lists each: NaN is no listed value."""
    logp = s.logprobs.double()
    listed, order = s.ids.masked_fill(logp.isnan(), -1).sort(1)
    at = torch.searchsorted(listed, ids.contiguous()).clamp(max=_listed(s) - 1)
    return logp.gather(1, order.gather(1, at)), listed.gather(1, at) == ids
