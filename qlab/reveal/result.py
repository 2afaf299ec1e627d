"""What was found, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlab.recipe import Node, Output, Weights, node_from_plain
from qlab.reveal.compare import Difference
from qlab.reveal.parts import Core
from qlab.serial import read_json

SCHEMA = "qlab.revealed/1"


@dataclass(frozen=True)
class Evidence:
    """One question, what the probes said, and how many calls it took."""

    question: str
    answer: str
    calls: int


@dataclass(frozen=True)
class Found:
    """What probes alone say of one output element."""

    node: Node
    core: Core | None
    ordered: bool
    exact: bool | None
    """Whether a replay of what was found gives the target's bits on random inputs; None where that could not be asked."""
    evidence: tuple[Evidence, ...]
    assumed: tuple[str, ...]
    weights: Weights | None = None
    output: Output = field(default_factory=Output)


@dataclass(frozen=True)
class Comparison:
    """The revealed tree beside the one in the kernel's recipe."""

    recipe: str
    """The recipe's hash."""
    gpu: str
    tree_hash: str
    """Of the recipe's tree, as :func:`qlab.reveal.compare.tree_hash`."""
    equal: bool
    """The tree, what the weight is and what happens to the sum."""
    identical: bool
    """Whether the recipe's tree has the very hash, without anything settled."""
    rules: str
    """How the rules for weight and output differ; empty where they do not or were not asked for."""
    difference: Difference | None
    region: str
    """The recipe's region of the element, and how the elements that answered alike fit it; empty for a replay."""


@dataclass(frozen=True)
class Revealed:
    """One element of one kernel's output, found from outside."""

    schema: str
    kernel: str
    source: str
    """``native kernel (...)`` or ``replay of the recipe for ...``."""
    native: bool
    gpu: str
    M: int
    K: int
    N: int
    dtype: str
    group_size: int
    row: int
    column: int
    tree: Any
    """The sum as nested lists, see :func:`qlab.recipe.plain`."""
    tree_hash: str
    core: Core | None
    weights: str
    """A key of qlab.recipe.WEIGHTS; empty where it was not asked for."""
    scale_after_sum: bool
    ordered: bool
    exact: bool | None
    evidence: tuple[Evidence, ...]
    assumed: tuple[str, ...]
    alike: tuple[tuple[int, ...], ...]
    """Rectangles (row, stop, column, stop) of the output that answered every probe as this element did; native kernels only."""
    calls: int
    seconds: float
    comparison: Comparison | None

    @property
    def node(self) -> Node:
        return node_from_plain(self.tree)

    @classmethod
    def read(cls, path: Path) -> Revealed:
        """From a file that ``--json`` wrote. Raises QlabError naming it."""
        return read_json(cls, path, SCHEMA)
