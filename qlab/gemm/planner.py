"""Who makes a kernel's plans: from its recipe and its table, or from a choice that is being tried."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlab.backends.registry import Problem
from qlab.gemm.plan import Plan, make_plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu
from qlab.recipes import scheme_of, tuned
from qlab.recipes.cuda_int4 import cut
from qlab.recipes.scheme import Scheme

SLICED = ("cuda.split", "cuda.batch_invariant")
"""Kernels whose cut of K the table decides."""


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one kernel of the registry; equal planners share their plans on a device."""

    kernel: str
    choice: tuned.Choice | None = None
    """In place of the table's, for a tuner; its slices count where the kernel has slices."""

    def scheme(self, problem: Problem, gpu: Gpu) -> Scheme:
        """What a problem with an M computes. Raises UnsupportedError where the kernel does not run it."""
        scheme = scheme_of(self.kernel, problem, gpu)
        if self.choice is None or self.kernel not in SLICED:
            return scheme
        return replace(scheme, cut=cut(self.choice, problem.M, problem.K, problem.N))

    def __call__(self, problem: Problem, gpu: Gpu, variants: tuple[Variant, ...]) -> Plan:
        choice = self.choice or tuned.choice(self.kernel, gpu.key, problem.M, problem.K, problem.N)
        return make_plan(self.scheme(problem, gpu), problem, gpu, variants, dict(choice.config))
