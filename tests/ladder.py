"""The ladder: one rung after another that a kernel must climb before its numbers are believed.

Plain functions of a kernel, a case, a dtype and a device, which return a record; tests judge it, a script can write it as
JSON. A rung is ``refused`` where the kernel says that it cannot run the case, with the kernel's reason.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from qlab.backends.reference import oracle
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.errors import QlabError
from qlab.inputs import one_hot_rows, random_activations, random_weight
from qlab.weights import Int4Weight, round_once, tensor_bytes

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One shape: ``m`` rows of x a call, groups of ``group`` rows (K for the whole column)."""

    m: int
    k: int
    n: int
    group: int
    act_order: bool = False

    def __str__(self) -> str:
        return f"m{self.m}-k{self.k}-n{self.n}-g{self.group}{'-act_order' if self.act_order else ''}"


@dataclass(frozen=True)
class Result:
    """What came of one rung. ``status`` is passed, failed or refused; ``detail`` says what and where."""

    rung: str
    kernel: str
    case: str
    dtype: str
    device: str
    status: str
    detail: str = ""


class Refused(Exception):
    """The kernel does not run this case."""


def probe_weight(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> Int4Weight:
    """Every code in every nibble, every zero point that the kernel accepts, scales distinct per group and column.

    Raises Refused with the kernel's reason when it accepts none.
    """
    w = random_weight(case.k, case.n, case.group, dtype=dtype, act_order=case.act_order, seed=11)
    for nibble in range(8):
        for part in (w.codes[:, nibble::8], w.codes[nibble::8]):
            assert part.unique().numel() == 16, f"{case}: nibble {nibble} does not take every code"
    problem = Problem.of(w, case.m)
    answers = {z: kernel.supports(replace(problem, zero_min=z, zero_max=z, symmetric=z == 8), device) for z in (8, *range(17))}
    held = [z for z, answer in answers.items() if answer.ok]
    if not held:
        raise Refused(answers[8].reason)
    pick = torch.randperm(w.zeros.numel(), generator=torch.Generator().manual_seed(5)) % len(held)
    zeros = torch.tensor(held, dtype=torch.uint8)[pick].reshape(w.zeros.shape)
    assert zeros.unique().numel() == len(held), f"{case}: too few columns for {len(held)} zero points"
    w = replace(w, zeros=zeros, scales=distinct_scales(*w.scales.shape, dtype))
    answer = kernel.supports(Problem.of(w, case.m), device)
    if not answer.ok:
        raise Refused(answer.reason)
    return w.to(device)


def distinct_scales(groups: int, n: int, dtype: torch.dtype) -> Tensor:
    """Scales [groups, n] from 2^-8 to 2^-6, all distinct while the dtype has enough; neighbours always are."""
    start, stop = (int(torch.tensor(2.0**e, dtype=dtype).view(torch.int16)) for e in (-8, -6))
    step = n if groups * n <= stop - start else 97
    order = (torch.arange(n) + step * torch.arange(groups)[:, None]) % (stop - start)
    return (start + order).to(torch.int16).view(dtype)


def exact_probe(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> Int4Weight:
    """The probe weight with scales 2^-4, 2^-5, 2^-6.

    Times :func:`integers` a product is a multiple of 2^-6 of at most 13 bits, so fp32 adds 2^11 of them exactly in any order.
    """
    w = probe_weight(kernel, case, dtype, device)
    power = torch.randint(4, 7, tuple(w.scales.shape), generator=torch.Generator().manual_seed(6))
    return replace(w, scales=torch.pow(2.0, -power.double()).to(dtype).to(device))


def integers(m: int, k: int, *, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """x [m, k] of whole numbers from -127 to 127: sums with :func:`exact_probe` are exact in fp32 and do not fit fp16."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (m, k), generator=g).to(dtype)


def one_hot(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Rows of the identity return the decoded weight bit for bit: storage and dequantisation, apart from sums."""
    w = probe_weight(kernel, case, dtype, device)
    packed = kernel.pack(w)
    rows = [
        kernel.run(one_hot_rows(start, min(start + case.m, w.K), w.K, dtype=dtype).to(device), packed)
        for start in range(0, w.K, case.m)
    ]
    return _difference(torch.cat(rows), kernel.decoded(w), ("k", "n"))


def exact(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Inputs whose products and sums are exact return float64's result rounded once."""
    w = exact_probe(kernel, case, dtype, device)
    x = integers(case.m, w.K, dtype=dtype, seed=1).to(device)
    return _difference(kernel.run(x, kernel.pack(w)), round_once(oracle(x, w), dtype))


def random_inputs(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Relative L2 error at most twice that of ``torch.matmul`` in the same dtype on the decoded weight."""
    w = probe_weight(kernel, case, dtype, device)
    x = random_activations(case.m, w.K, dtype=dtype, seed=2).to(device)
    decoded = kernel.decoded(w)
    truth = x.double() @ decoded.double()
    own, theirs = (float((y.double() - truth).norm() / truth.norm()) for y in (kernel.run(x, kernel.pack(w)), x @ decoded))
    return "" if own <= 2 * theirs else f"relative L2 error {own:.2e}, torch.matmul {theirs:.2e}"


def poisoned(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Every output element is written: memory that the kernel allocates holds NaN beforehand."""
    w = exact_probe(kernel, case, dtype, device)
    x = integers(case.m, w.K, dtype=dtype, seed=3).to(device)
    packed = kernel.pack(w)
    want = round_once(oracle(x, w), dtype)
    with nan_memory(device, case.m * case.n):
        y = kernel.run(x, packed)
    return _difference(y, want)


def repeats(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Ten runs give one hash."""
    seen = fingerprints(kernel, case, dtype, device)
    return "" if len(set(seen)) == 1 else f"{len(set(seen))} different outputs in {len(seen)} runs"


def ragged_rows(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """M that fill no tile, and M = 0, give exact results of the right shape."""
    w = exact_probe(kernel, case, dtype, device)
    packed = kernel.pack(w)
    for m in (0, 1, 3, 8, 15, 17, 33, 65):
        x = integers(m, w.K, dtype=dtype, seed=m).to(device)
        y = kernel.run(x, packed)
        if tuple(y.shape) != (m, w.N):
            return f"M={m}: the output is {list(y.shape)}"
        fault = _difference(y, round_once(oracle(x, w), dtype))
        if fault:
            return f"M={m}: {fault}"
    return ""


def strided_rows(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Rows of x further apart than K, with NaN between them, give what contiguous rows give."""
    w = exact_probe(kernel, case, dtype, device)
    wide = torch.full((case.m, w.K + 24), float("nan"), dtype=dtype)
    wide[:, 8 : 8 + w.K] = integers(case.m, w.K, dtype=dtype, seed=4)
    x = wide.to(device)[:, 8 : 8 + w.K]
    return _difference(kernel.run(x, kernel.pack(w)), round_once(oracle(x, w), dtype))


def refuses(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """x of a wrong width, dtype or layout is refused with a sentence, not computed."""
    w = exact_probe(kernel, case, dtype, device)
    packed = kernel.pack(w)
    x = integers(max(case.m, 2), w.K, dtype=dtype).to(device)
    wrong = {
        "too few columns": x[:, :-8].contiguous(),
        "three dimensions": x[None],
        "float32": x.float(),
    }
    if kernel.layout != "none":  # plain PyTorch takes any strides
        wrong["column-major"] = x.t().contiguous().t()
    for what, bad in wrong.items():
        try:
            kernel.run(bad, packed)
        except QlabError:
            continue
        except Exception as e:  # a crash is a refusal too, but says nothing to the reader
            return f"x with {what}: {type(e).__name__} instead of a sentence"
        return f"x with {what} was computed"
    return ""


RUNGS = (one_hot, exact, random_inputs, poisoned, repeats, ragged_rows, strided_rows, refuses)


def climb(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, rungs=RUNGS) -> Iterator[Result]:
    """Run ``rungs`` and yield a record of each. A rung that raises has failed."""
    for rung in rungs:
        try:
            fault = rung(kernel, case, dtype, device)
            status = "failed" if fault else "passed"
        except Refused as e:
            status, fault = "refused", str(e)
        except Exception as e:  # recorded, so that one broken kernel does not end a whole run
            status, fault = "failed", f"{type(e).__name__}: {e}"
        yield Result(rung.__name__, kernel.name, str(case), str(dtype).removeprefix("torch."), str(device), status, fault)


def fingerprints(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, runs: int = 10) -> list[str]:
    """sha256 of the output of each of ``runs`` equal calls on random inputs."""
    w = probe_weight(kernel, case, dtype, device)
    x = random_activations(case.m, w.K, dtype=dtype, seed=7).to(device)
    packed = kernel.pack(w)
    return [hashlib.sha256(tensor_bytes(kernel.run(x, packed))).hexdigest() for _ in range(runs)]


def fingerprints_elsewhere(names: list[str], case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, list[str]]:
    """:func:`fingerprints` of registered kernels in a fresh process."""
    code = f"""
import json, torch
from qlab.backends.registry import kernel
from tests.ladder import Case, fingerprints
device = torch.device({str(device)!r})
print(json.dumps({{name: fingerprints(kernel(name), {case!r}, {dtype}, device) for name in {names!r}}}))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@contextmanager
def nan_memory(device: torch.device, elements: int) -> Iterator[None]:
    """Make new memory hold NaN: what PyTorch's Python functions allocate, and on a GPU what its allocator hands out next."""
    if device.type == "cuda":
        held = [torch.full((elements * size,), float("nan"), device=device) for size in (1, 1, 8, 8)]
        del held

    def filled(make):
        def wrapper(*args, **kwargs) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


class Wrapped(Kernel):
    """A kernel that does what another does, for a test to spoil."""

    def __init__(self, inner: Kernel, name: str = "") -> None:
        self.inner, self.name, self.layout = inner, name or f"{inner.name} spoilt", inner.layout

    def supports(self, problem: Problem, device: torch.device):
        return self.inner.supports(problem, device)

    def pack(self, weight: Int4Weight) -> Packed:
        return self.inner.pack(weight)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return self.inner.run(x, packed)


def _difference(y: Tensor, want: Tensor, axes: tuple[str, str] = ("m", "n")) -> str:
    """Where y first differs from ``want``, or nothing. Zeros of either sign are equal: a sum from +0 has no -0."""
    if y.shape != want.shape or y.dtype != want.dtype:
        return f"{y.dtype} {list(y.shape)} instead of {want.dtype} {list(want.shape)}"
    wrong = ~((y == want) | (y.isnan() & want.isnan()))
    if not bool(wrong.any()):
        return ""
    i, j = (int(v) for v in wrong.nonzero()[0])
    where = f"({axes[0]}, {axes[1]}) = ({i}, {j})"
    return f"{int(wrong.sum())} of {wrong.numel()} elements, first {where}: {float(y[i, j])!r} instead of {float(want[i, j])!r}"
