"""Questions as rows of activations, and outputs as answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlab.recipe import Type
from qlab.reveal.target import Target
from qlab.reveal.topology import Asking, Count, Question, R, RevealError, Value


@dataclass(frozen=True)
class Format:
    """The numbers to probe with: M, u, and how many u an output counts exactly.

    M / u exceeds 2^25 times the number of units, so that M swamps sums of them too, even under the three guard bits of a
    tensor core.
    """

    big: float
    unit: float
    most: int
    type: Type
    bits: int
    """Of the output's significand."""


FORMATS = {
    torch.float16: Format(2.0**15, 2.0**-24, 2048, "fp16", 11),
    torch.bfloat16: Format(2.0**60, 1.0, 256, "bf16", 8),
    torch.float32: Format(2.0**60, 1.0, 2**24, "fp32", 24),
}


class Prober:
    """Asks a target, whose weight is 1 at every k."""

    def __init__(self, target: Target) -> None:
        self.target, self.format = target, FORMATS[target.dtype]
        self.most = min(self.format.most, FORMATS[target.out_dtype].most)

    def solve(self, asking: Asking[R]) -> R:
        """Runs ``asking`` to its end."""
        try:
            questions = next(asking)
            while True:
                questions = asking.send(self.answers(questions))
        except StopIteration as end:
            return end.value

    def answers(self, questions: Sequence[Question]) -> list[float]:
        rows: list[tuple[list[int], list[float]]] = []
        owner: list[int] = []
        for i, question in enumerate(questions):
            for row in self._rows(question):
                rows.append(row)
                owner.append(i)
        outputs = self.target.ask(self._dense(rows))
        found = [0.0] * len(questions)
        for i, (positions, _), out in zip(owner, rows, outputs, strict=True):
            question = questions[i]
            found[i] += self._swamped(question, len(positions) - 2, float(out)) if isinstance(question, Count) else float(out)
        return found

    def values(self, rows: Sequence[dict[int, float]]) -> list[float]:
        """The outputs for some numbers at some k each."""
        return self.answers([Value(tuple(row.items())) for row in rows])

    def _rows(self, question: Question) -> list[tuple[list[int], list[float]]]:
        if isinstance(question, Value):
            return [([k for k, _ in question.at], [v for _, v in question.at])]
        big, unit = self.format.big, self.format.unit
        parts = [question.units[i : i + self.most] for i in range(0, max(len(question.units), 1), self.most)]
        return [([question.plus, question.minus, *units], [big, -big, *[unit] * len(units)]) for units in parts]

    def _dense(self, rows: list[tuple[list[int], list[float]]]) -> Tensor:
        x = torch.zeros((len(rows), self.target.k), dtype=self.target.dtype)
        for i, (positions, values) in enumerate(rows):
            x[i, positions] = torch.tensor(values, dtype=torch.float64).to(x.dtype)
        return x

    def _swamped(self, question: Count, units: int, out: float) -> float:
        left = out / self.format.unit
        if not (np.isfinite(left) and left == round(left) and 0 <= left <= units):
            where = f"+M at k={question.plus}, -M at k={question.minus} and {units} units"
            raise RevealError(f"{where} give {left:g} units, which is no count: are the weights all 1?")
        return units - left
