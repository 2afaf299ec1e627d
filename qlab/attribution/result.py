"""The answer to why two paths differ, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import read_json

SCHEMA = "qlab.explained/1"
LOGPROBS, OUTPUT, PROJECTION = MEASURES = ("logprobs", "output", "projection")
"""Squared L2 of the final log-probabilities at A's top-k ids, in nat squared, the factor swapped in every layer; sum over the
linear layers of ||y - y_A||^2 / ||y_A||^2, all on A's inputs; <y - y_A, y_B - y_A> / ||y_B - y_A||^2, each summed over them."""
PACKING = "packing"
"""The category of which every answer says what it contributes."""


@dataclass(frozen=True)
class Factor:
    """A part of weight, packing or recipe that was taken from A or from B."""

    name: str
    category: str
    union: str
    """The factors it is swapped together with, in words; empty where it stands alone."""
    a: str
    """What it is on A's side, in words."""
    b: str
    same: bool = False
    """Without a difference of its own that shows in a sum: it contributes exactly 0 and was not swapped."""


@dataclass(frozen=True)
class Share:
    """A factor's part of one measure."""

    factor: str
    value: float
    """The part, in the measure's unit, rounded to a float."""
    share: float
    """``value`` / total; nan where the total is 0."""
    alone: float | None = None
    """The measure where this factor alone is B's; None where such a hybrid cannot be built."""
    removed: float | None = None
    """What the measure loses where all but this factor are B's; None likewise."""
    low: float | None = None
    """95% interval of ``value``: over draws of orders where these were sampled, else of its share over resampled prompts (or
    calls of a layer), times the total; None for a single one."""
    high: float | None = None


@dataclass(frozen=True)
class Interaction:
    """What two factors do together beyond what each does alone, averaged; negative where they overlap or cancel."""

    first: str
    second: str
    value: float
    """In the measure's unit."""


@dataclass(frozen=True)
class Measure:
    """One value function at B, split among the factors."""

    name: str
    """One of ``MEASURES``."""
    total: float
    parts: tuple[Share, ...]
    """Of the factors that were swapped."""
    interactions: tuple[Interaction, ...] = ()
    residual: float = 0.0
    """The total minus the sum of the parts as they are rounded to floats; as fractions they leave 0."""
    samples: int = 0
    """Draws of an order of swaps; 0 where all admissible orders were averaged."""

    def part(self, factor: str) -> Share | None:
        """A factor's part; None for one that was not swapped."""
        return next((p for p in self.parts if p.factor == factor), None)


@dataclass(frozen=True)
class LayerMeasure:
    """One linear layer at B against A, on A's inputs, with its share of the measure ``output``."""

    layer: str
    M: int
    """Rows of the calls."""
    relative_l2: float
    """||y_B - y_A|| / ||y_A||."""
    differing: int
    """Elements whose bits differ."""
    elements: int
    values: dict[str, float]
    """Factor to its part of this layer's squared relative L2."""


@dataclass(frozen=True)
class End:
    """How an end point was obtained, and whether its replay gives the same bits."""

    path: str
    origin: str
    """``native`` or ``replay``."""
    kernels: tuple[str, ...]
    """Registry names of the kernels that ran."""
    compared: int
    """Elements that were compared with the hybrid's at this end."""
    differing_bits: int | None
    """Bits in which they differ; None where they were not compared or the order of atomics is not fixed."""


@dataclass(frozen=True)
class Explained:
    """The answer of ``--explain``. Raises QlabError where a part names no factor."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    a: str
    """Path as text, ``awq@h100``."""
    b: str
    where: str
    """Models or shape, with digests, in words."""
    rows: int
    """Rows of log-probabilities that were compared; 0 where there is no model."""
    tokens: int
    """Tokens that were fed, or rows of a layer's input."""
    ends: tuple[End, ...]
    """A's, then B's."""
    factors: tuple[Factor, ...]
    measures: tuple[Measure, ...]
    layers: tuple[LayerMeasure, ...]
    notes: tuple[str, ...]
    evaluations: int
    """Hybrids that were run, both ends included."""
    seconds: float

    def __post_init__(self) -> None:
        known = {f.name for f in self.factors}
        for m in self.measures:
            if m.name not in MEASURES:
                raise QlabError(f"measure {m.name!r} is none of {', '.join(MEASURES)}")
            for name in (*(p.factor for p in m.parts), *(x for i in m.interactions for x in (i.first, i.second))):
                if name not in known:
                    raise QlabError(f"measure {m.name!r} has a part {name!r}, which is none of the factors")

    def measure(self, name: str) -> Measure | None:
        """One of the measures; None where it was not taken."""
        return next((m for m in self.measures if m.name == name), None)

    @classmethod
    def read(cls, path: Path) -> Explained:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)
