"""Two traces of the same tokens: their distance and how many rows agree bit by bit, per prompt and in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlab.engine.run import Scored
from qlab.errors import QlabError
from qlab.logprobs.distance import compare, sequence_distance
from qlab.logprobs.trace import Trace

SCHEMA = "qlab.logprobs.comparison/1"


@dataclass(frozen=True)
class Difference:
    """One prompt's rows, or all of them: distances are L2 over the generator's top-k log-probabilities."""

    rows: int
    distance: float
    """Infinite where the generated tokens split apart; over all prompts the mean."""
    prompt: float
    """The same over the prompt's rows alone."""
    generated: float
    """The same over the generated rows alone."""
    identical: float
    """Share of rows with every top-k log-probability equal bit by bit; NaN where tokens split apart."""
    flips: int
    """Rows whose most probable token differs."""
    unlisted: int
    """Ids of the generator that the other does not list: its smallest value stands in."""
    digests: float
    """Share of the linears' output rows whose digests differ; NaN where a trace keeps none."""


@dataclass(frozen=True)
class Compared:
    """A generator's trace and another of the same prompts."""

    generator: str
    other: str
    top_k: int
    """Log-probabilities compared per row; 0 for the whole vocabulary."""
    total: Difference
    prompts: tuple[Difference, ...]
    schema: str = SCHEMA


def compare_traces(a: Trace, b: Trace, *, top_k: int | None = None, decimals: int | None = None) -> Compared:
    """``b`` against its generator ``a``, over the ids that ``a`` lists as its ``top_k`` (its own number without one).

    Raises QlabError where the prompts differ, or ``a`` keeps fewer log-probabilities.
    """
    if len(a.sequences) != len(b.sequences):
        raise QlabError(f"the traces have {len(a.sequences)} and {len(b.sequences)} prompts; compare traces of the same ones")
    kept = a.manifest.columns
    if top_k is not None and not 0 <= top_k <= kept:
        raise QlabError(f"top_k {top_k}: the generator's trace keeps {kept} log-probabilities per row")
    k = top_k or (kept if a.manifest.request.top_k else 0)
    both = zip(a.sequences, b.sequences, strict=True)
    with_digests = a.manifest.linears == b.manifest.linears
    each = tuple(_difference(i, x, y, k or None, decimals, with_digests) for i, (x, y) in enumerate(both))
    return Compared(_name(a), _name(b), k, _total(each), each)


def _difference(i: int, a: Scored, b: Scored, k: int | None, decimals: int | None, with_digests: bool) -> Difference:
    try:
        far, prompt, generated = (
            sequence_distance(a, b, part, top_k=k, decimals=decimals) for part in ("all", "prompt", "generated")
        )
        if math.isinf(far):
            return Difference(len(a.tokens) - 1, far, prompt, generated, math.nan, 0, 0, math.nan)
        found = compare(a, b, top_k=k, decimals=decimals)
    except QlabError as e:
        raise QlabError(f"prompt {i + 1}: {e}") from None
    digests = math.nan
    if with_digests and a.digests is not None and b.digests is not None:
        digests = float((a.digests != b.digests).double().mean())
    return Difference(
        rows=len(found.distances),
        distance=far,
        prompt=prompt,
        generated=generated,
        identical=float(found.identical.double().mean()),
        flips=int(found.flips.sum()),
        unlisted=int(found.unlisted.sum()),
        digests=digests,
    )


def _total(each: Sequence[Difference]) -> Difference:
    rows = torch.tensor([d.rows for d in each], dtype=torch.float64)

    def mean(name: str) -> float:
        return sum(getattr(d, name) for d in each) / len(each)

    def share(name: str) -> float:
        parts = torch.tensor([getattr(d, name) for d in each], dtype=torch.float64)
        return float((parts * rows).sum() / rows.sum())

    return Difference(
        rows=int(rows.sum()),
        distance=mean("distance"),
        prompt=mean("prompt"),
        generated=mean("generated"),
        identical=share("identical"),
        flips=sum(d.flips for d in each),
        unlisted=sum(d.unlisted for d in each),
        digests=share("digests"),
    )


def _name(t: Trace) -> str:
    forced = t.manifest.request.forced
    return f"{t.manifest.path}, {t.manifest.engine}" + (f", {forced.mode} of {forced.path}'s tokens" if forced else "")
