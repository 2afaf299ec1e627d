"""The result of bench/step_bias.py as data, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlab.environment import Environment
from qlab.report.markdown import table
from qlab.report.terminal import share

SCHEMA, SILICON_SCHEMA = "qlab.step_bias/1", "qlab.step_bias.silicon/1"
HOLDS = 0.05
"""A ratio that is off by no more is said to hold."""


@dataclass(frozen=True)
class Ratio:
    """How much more one step shrinks |accumulator| than another."""

    dtype: str
    what: str
    predicted: float
    """By the closed form."""
    earlier: float
    """By an earlier simulation; NaN without one."""
    measured: float
    low: float
    """95% bootstrap interval over data sets."""
    high: float


@dataclass(frozen=True)
class Loss:
    """What a step takes from the accumulators: sum of sign(exact) (exact - accumulator) over sum of |exact|."""

    dtype: str
    step: str
    fraction_bits: int
    terms: int
    loss: float
    low: float
    high: float
    predicted: float
    """By the closed form along the exact chain, of the first data sets."""
    of_those: float
    """The loss of the same data sets."""


@dataclass(frozen=True)
class Pair:
    """Two ways on the same inputs."""

    dtype: str
    what: str
    outputs: int
    accumulators: int
    """fp32 accumulators that differ."""
    differing: int
    """Outputs, rounded to dtype, that differ."""
    earlier: tuple[float, ...]
    """Both as shares in an earlier simulation."""


@dataclass(frozen=True)
class Interaction:
    """One measure of the way from A100's step to H100's: F alone, L alone, both; and what is left over from adding up."""

    measure: str
    f: float
    terms: float
    both: float
    interaction: float
    """both - f - terms."""
    shapley_f: float
    """F's part over both orders; with ``shapley_terms`` it adds up to ``both``."""
    shapley_terms: float


@dataclass(frozen=True)
class Result:
    schema: str
    environment: Environment
    K: int
    group_size: int
    weights: str
    """``normal``, rounded to nearest, or ``uniform`` codes and random scales."""
    seeds: int
    outputs: int
    """Of each dtype, over all data sets."""
    losses: tuple[Loss, ...]
    ratios: tuple[Ratio, ...]
    pairs: tuple[Pair, ...]
    interactions: tuple[Interaction, ...]


@dataclass(frozen=True)
class SiliconChain:
    """Whole chains of one instruction on a GPU, against their replay."""

    dtype: str
    instruction: str
    fraction_bits: int
    terms: int
    outputs: int
    mismatches: int
    """Accumulators whose bits are not the replay's."""
    loss: float
    """As :class:`Loss`, of the GPU's own accumulators."""


@dataclass(frozen=True)
class Silicon:
    schema: str
    environment: Environment
    gpu: str
    K: int
    group_size: int
    weights: str
    seeds: int
    chains: tuple[SiliconChain, ...]
    ratios: tuple[Ratio, ...]


def verdict(ratios: Sequence[Ratio]) -> str:
    """How far the closed form of the ratios is off, by dtype, without a full stop."""
    parts = []
    for dtype in dict.fromkeys(r.dtype for r in ratios):
        worst = max(abs(r.measured / r.predicted - 1) for r in ratios if r.dtype == dtype)
        how = "it holds to" if worst <= HOLDS else "it does not hold, being off by up to"
        parts.append(f"in {dtype} {how} {100 * worst:.1f}%")
    return f"The closed form of the loss: {', '.join(parts)}"


def markdown(r: Result) -> str:
    """The tables of the replayed part."""
    parts = [_ratio_table(r.ratios)]
    rows = [
        [
            *(f"({v.fraction_bits}, {v.terms})", v.dtype, f"{v.loss:.3e} [{v.low:.3e}, {v.high:.3e}]"),
            f"{100 * (v.predicted / v.of_those - 1):+.1f}%",
        ]
        for v in r.losses
    ]
    parts.append(table(["(F, L)", "dtype", "loss of the accumulators [95%]", "closed form along the chain off by"], rows))
    rows = [
        [
            *(p.what, p.dtype, share(p.accumulators / p.outputs), share(p.differing / p.outputs)),
            " / ".join(f"{100 * v:.3g}%" for v in p.earlier),
        ]
        for p in r.pairs
    ]
    parts.append(table(["pair", "dtype", "fp32 accumulators that differ", "outputs that differ", "simulated before"], rows))
    rows = [
        [i.measure, *(f"{v:+.2e}" for v in (i.f, i.terms, i.both, i.interaction, i.shapley_f, i.shapley_terms))]
        for i in r.interactions
    ]
    parts.append(table(["A100 to H100", "F alone", "L alone", "both", "interaction", "F, Shapley", "L, Shapley"], rows))
    return "\n\n".join(parts)


def silicon_markdown(r: Silicon) -> str:
    """The tables of the GPU's part."""
    rows = [
        [f"`{c.instruction}`", c.dtype, f"({c.fraction_bits}, {c.terms})", f"{c.outputs:,}", str(c.mismatches), f"{c.loss:.3e}"]
        for c in r.chains
    ]
    head = ["chain of", "dtype", "replayed as (F, L)", "accumulators", "**that differ**", "loss"]
    return f"{table(head, rows)}\n\n{_ratio_table(r.ratios)}"


def _ratio_table(ratios: Sequence[Ratio]) -> str:
    rows = [
        [
            r.what,
            r.dtype,
            f"{r.predicted:.3f}",
            f"{r.measured:.3f} [{r.low:.3f}, {r.high:.3f}]",
            f"{100 * (r.measured / r.predicted - 1):+.1f}%",
            "-" if np.isnan(r.earlier) else f"{r.earlier:g}",
        ]
        for r in ratios
    ]
    return table(["ratio of losses", "dtype", "closed form", "measured [95%]", "off by", "simulated before"], rows)
