"""What is asked: one output element of a GEMM, as a function of the activations that feed it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.recipe import Node, Output, Recipe, Tile, Unordered, Weights
from qlab.recipes.build import type_name
from qlab.replay import native, reference
from qlab.replay.operands import Operands, bits, decode, values
from qlab.replay.program import compile_recipe
from qlab.weights import Int4Weight

CHUNK = 1 << 24
"""Elements of probes asked for at once: bounds the memory."""


class Target(ABC):
    """Answers probes: rows of activations, each with the output element that they give."""

    def __init__(self, k: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        self.k, self.dtype, self.out_dtype = k, dtype, out_dtype
        self.calls = 0

    def ask(self, probes: Tensor) -> np.ndarray:
        """float64 [P]: the output element for each of ``probes`` [P, K], of the activations' dtype, on the CPU."""
        self.calls += len(probes)
        step = max(1, CHUNK // self.k)
        parts = [self.answer(probes[i : i + step]) for i in range(0, len(probes), step)]
        return np.concatenate([p.double().cpu().numpy() for p in parts]) if parts else np.zeros(0)

    @abstractmethod
    def answer(self, probes: Tensor) -> Tensor:
        """The output elements [P], in the output's dtype."""


class Called(Target):
    """Element (row, column) of any function of x [M, K], one call for each probe, which stands in all M rows.

    So rows and columns that answer every probe alike are known to be summed alike, without a further call.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        m: int,
        k: int,
        dtype: torch.dtype,
        *,
        row: int = 0,
        column: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.function, self.m, self.row, self.column, self.device = function, m, row, column, torch.device(device)
        y = function(torch.zeros((m, k), dtype=dtype, device=self.device))
        if y.ndim != 2 or y.shape[0] != m or not (0 <= row < m and 0 <= column < y.shape[1]):
            raise QlabError(f"element ({row}, {column}) is not one of the output {list(y.shape)} for x [{m}, {k}]")
        super().__init__(k, dtype, y.dtype)
        self.history = torch.zeros(y.shape, dtype=torch.int64, device=self.device)

    def answer(self, probes: Tensor) -> Tensor:
        found = []
        for probe in probes.to(self.device):
            y = self.function(probe.expand(self.m, -1).contiguous())
            found.append(y[self.row, self.column].clone())
            as_integers = y.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()])
            self.history = self.history * 1000003 + as_integers
        return torch.stack(found)

    def alike(self) -> np.ndarray:
        """bool [M, N]: the elements that have answered every probe as this one did."""
        return (self.history == self.history[self.row, self.column]).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Model:
    """What one output element is said to be: a sum, what multiplies the probes, what happens to the sum."""

    tree: Node
    weights: Weights = "rounded"
    output: Output = field(default_factory=Output)


class Replayed(Target):
    """An output element as a recipe has it. The probes take the weight's place: products commute, and columns are fast.

    Atomics are added in a new random order for each probe.
    """

    def __init__(self, model: Model, weight: Int4Weight, column: int = 0, seed: int = 0) -> None:
        super().__init__(weight.K, weight.dtype, weight.dtype)
        self.model, self.random = model, torch.Generator().manual_seed(seed)
        one = weight.columns(column, column + 1)
        self.scales, self.group = one.scales, one.group_index
        self.w = decode(self._recipe(model.tree, model.output, 1), one.codes, one.zeros, one.scales, one.group_index).t()

    def answer(self, probes: Tensor) -> Tensor:
        tree, output = self.model.tree, self.model.output
        if not isinstance(tree, Unordered) or len(tree.parts) < 3:
            return self._replay(tree, output, probes)
        if output != Output() or tree.type != type_name(self.dtype):
            raise UnsupportedError(f"atomics in {tree.type} of {type_name(self.dtype)} activations are not replayed one by one")
        parts = torch.stack([self._replay(part, Output(scale=tree.scaled), probes) for part in tree.parts])  # [parts, P]
        order = torch.rand(parts.shape, generator=self.random).argsort(0)
        total = torch.zeros(len(probes), dtype=self.dtype)
        for part in parts.gather(0, order):
            total = total + part
        return total

    def _replay(self, tree: Node, output: Output, probes: Tensor) -> Tensor:
        count = len(probes)
        recipe, scales = self._recipe(tree, output, count), self.scales.expand(-1, count).contiguous()
        x, none = bits(self.w), self.scales.new_empty(0)
        if native.reason():
            y = reference.run(recipe, x, Operands(probes.t(), scales, self.group, none))
        else:
            operands = bits(probes.t()), bits(scales), self.group.numpy(), bits(none)
            y = native.run(compile_recipe(recipe), x, *operands, bf16=self.dtype == torch.bfloat16)
        return values(y, self.dtype)[0]

    def _recipe(self, tree: Node, output: Output, count: int) -> Recipe:
        tile = Tile((0, 1), (0, count), tree, output)
        return Recipe.of(1, self.k, count, type_name(self.dtype), [tile], weights=self.model.weights)
