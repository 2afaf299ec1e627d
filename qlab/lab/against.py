"""The same kernels on another GPU, by replay: how many output bits two GPUs differ in, per kernel and per label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from qlab import compare, hardware
from qlab.backends import dispatch, registry
from qlab.backends.registry import Kernel, Problem
from qlab.lab.outputs import Replays, recipe_of
from qlab.lab.results import Against, AgainstRow
from qlab.recipe import Recipe


@dataclass
class _Sum:
    here: str
    there: str
    reason: str = ""
    outputs: int = 0
    differing: int = 0
    bits: int = 0
    other_order: list[str] = field(default_factory=list)
    moments: compare.Moments = field(default_factory=lambda: compare.Moments(0.0, 0.0))


class Comparison:
    """Adds up, layer by layer, the distance of ``other``'s outputs from the asked GPU's."""

    def __init__(self, asked: hardware.Gpu, other: hardware.Gpu, *, pin_marlin: bool) -> None:
        self.asked, self.other, self.pin_marlin = asked, other, pin_marlin
        self.rows: dict[str, _Sum] = {}

    def kernel(self, key: str, kernel: Kernel, layer: str, y: Tensor | None, replays: Replays, norm: float) -> None:
        """One kernel on both GPUs; ``y`` is its output on the asked one, ``norm`` the exact output's squared norm."""
        if kernel.portable:
            return
        self._add(key, kernel.name, kernel.name, layer, y, replays, norm)

    def labels(self, layer: str, outputs: Mapping[str, Tensor], replays: Replays, norm: float) -> None:
        """vLLM's labels: whichever kernel each GPU dispatches to; ``outputs`` are the asked GPU's, by kernel name."""
        problem = Problem.of(replays.weight, replays.x.shape[0])
        for label in dispatch.LABELS:
            here, there = (dispatch.dispatch(label, g, problem, pin_marlin=self.pin_marlin) for g in (self.asked, self.other))
            if here.kernel and there.kernel:
                self._add(label, here.kernel, there.kernel, layer, outputs.get(here.kernel), replays, norm)
            else:
                refused = here if not here.kernel else there
                self._skip(label, here.kernel, there.kernel, refused.reason)

    def _add(self, key: str, here: str, there: str, layer: str, y: Tensor | None, replays: Replays, norm: float) -> None:
        problem = Problem.of(replays.weight, replays.x.shape[0])
        mine, theirs = (recipe_of(registry.kernel(n), problem, g) for n, g in ((here, self.asked), (there, self.other)))
        for made in (theirs, mine):
            if isinstance(made, str):
                return self._skip(key, here, there, made)
            if made.opaque or not made.ordered:
                why = f"opaque: {made.opaque}" if made.opaque else "the order of atomics is not fixed"
                return self._skip(key, here, there, why)
        assert isinstance(mine, Recipe)
        assert isinstance(theirs, Recipe)
        row = self.rows.setdefault(key, _Sum(here, there))
        if row.reason:
            return None
        first = replays.run(mine) if y is None else y
        second = replays.run(theirs)
        row.outputs += first.numel()
        row.differing += compare.differing(first, second)
        row.bits += compare.differing_bits(first, second)
        row.moments += compare.Moments(compare.moments(second, first.double()).squared_error, norm)
        same_core = recipe_of(registry.kernel(there), problem, replace(self.other, step=self.asked.step))
        if isinstance(same_core, Recipe) and mine.hash != same_core.hash:
            row.other_order.append(layer)
        return None

    def _skip(self, key: str, here: str, there: str, why: str) -> None:
        row = self.rows.setdefault(key, _Sum(here, there))
        row.reason = row.reason or why

    def result(self) -> Against:
        rows = []
        for key, row in self.rows.items():
            r = _Sum(row.here, row.there, row.reason) if row.reason else row  # a part of the layers would mislead
            rows.append(
                AgainstRow(
                    key=key,
                    kernel=r.here,
                    other_kernel=r.there,
                    reason=r.reason,
                    outputs=r.outputs,
                    differing=r.differing,
                    bits=r.bits,
                    relative_l2=r.moments.relative_l2,
                    other_order=tuple(r.other_order),
                )
            )
        proved = self.asked.proved and self.other.proved
        return Against(self.other.key, proved, tuple(rows))
