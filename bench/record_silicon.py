"""Record what vLLM's kernels compute on this GPU, so that any machine can compare its own results with these, bit by bit.

    QLAB_VLLM_EXTENSION=/path/_C.so python -m bench.record_silicon --out DIR [--minutes 12] [--sum-order] [--limit 20]

QLAB_VLLM_SOURCE=/path/awq_triton.py adds vLLM's Triton kernel where vLLM is not installed. Every weight and every input is
re-created from the parameters and seeds in the JSON (:func:`make_weight`, :func:`make_activations`); its digest stands beside
them. Writes ``silicon.json`` (environment, problems, one record per problem and kernel) and ``silicon.npz`` (array
``bits``: uint16 patterns of up to 1,024 outputs per record, at :func:`sample_positions`). Both are rewritten whole as the run
goes on; what was written stays when it is killed.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlab.backends import failure
from qlab.backends.registry import Kernel, Problem, kernels
from qlab.backends.vllm_extension import Missing, extension
from qlab.compare import differing, digest, moments
from qlab.environment import collect
from qlab.errors import QlabError
from qlab.inputs import exact_activations, random_activations, random_weight
from qlab.lab.probe import decode, judge
from qlab.serial import write_json, write_whole
from qlab.weights import Int4Weight

SCHEMA = "qlab.silicon/1"
RUNS = 3
SAMPLE = 1024
PROBE_ROWS = (16, 256)
"""One-hot rows per call: kernels for few tokens and, where a label switches, the path for many."""
PROBE_ELEMENTS = 1 << 22
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

SMALL = (
    *((128, 64), (128, 128), (256, 64), (256, 128), (384, 192), (512, 128), (512, 256), (640, 320), (1024, 64), (512, 512)),
    *((512, 1024), (1024, 512), (512, 2048), (2048, 256), (1024, 1152), (2048, 1024), (1024, 4096), (4096, 512)),
)
"""(K, N): every way in which N and K select Marlin's tiles, and the layers of the model that travels with qlab."""
LARGE = ((4096, 4096), (4096, 6144), (14336, 4096), (4096, 28672))
TOKENS = (1, 16, 2, 64, 33, 8, 50, 256, 9, 128, 3, 48, 17, 51, 5, 65, 96, 15, 32, 129, 24, 100, 63, 192, 49, 255)


@dataclass(frozen=True)
class Case:
    """One weight, re-creatable from these parameters by :func:`make_weight`."""

    K: int
    N: int
    group_size: int
    """-1 for whole-column scales."""
    dtype: str
    form: str
    """``awq`` (asymmetric), ``gptq`` (symmetric) or ``act_order`` (symmetric, rows of a group scattered)."""
    values: str
    """``plain``, ``wide`` (scales and inputs over many binades) or ``exact`` (every sum is exact in fp32)."""
    seed: int
    tokens: tuple[int, ...]


@dataclass
class Recording:
    """Everything that goes into the JSON."""

    schema: str
    environment: Any
    extension: Any
    kernels: dict[str, str]
    conventions: dict[str, str]
    cases: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    first_calls: list[dict[str, Any]] = field(default_factory=list)
    sum_order: list[dict[str, Any]] = field(default_factory=list)
    argsort: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


CONVENTIONS = {
    "digest": "qlab.compare.digest: sha256 of dtype, shape and bytes of the whole output",
    "sample": f"[offset, count] into the npz array bits; positions in the flattened output: i for at most {SAMPLE} outputs, "
    "else (i * n) // 1024 + ((i * 2654435761) % 2**32 >> 16) % (n // 1024)",
    "error": "relative L2 distance from x @ w in float64, w = (q - z) * s not rounded",
    "repeatable": f"whether {RUNS} runs gave the same bits; the first one is recorded",
}


def sample_positions(n: int) -> np.ndarray:
    """int64 positions of the recorded outputs among ``n``, spread evenly with an offset that walks through rows and columns."""
    i = np.arange(min(n, SAMPLE), dtype=np.int64)
    if n <= SAMPLE:
        return i
    return (i * n) // SAMPLE + (((i * 2654435761) % 2**32) >> 16) % (n // SAMPLE)


def make_weight(case: Case) -> Int4Weight:
    """The weight of a case, on the CPU; the same bits on every machine."""
    dtype = DTYPES[case.dtype]
    symmetric, act_order = case.form != "awq", case.form == "act_order"
    w = random_weight(
        case.K, case.N, case.group_size, dtype=dtype, symmetric=symmetric, act_order=act_order, seed=case.seed, name=_name(case)
    )
    if case.values == "plain":
        return w
    g = torch.Generator().manual_seed(case.seed + 1)
    if case.values == "wide":
        power = torch.randint(-6, 4, tuple(w.scales.shape), generator=g)
        return replace(w, scales=(w.scales.double() * torch.pow(2.0, power.double())).to(dtype))
    power = torch.randint(4, 7, tuple(w.scales.shape), generator=g)
    return replace(w, scales=torch.pow(2.0, -power.double()).to(dtype))


def make_activations(values: str, m: int, k: int, dtype: str, seed: int) -> Tensor:
    """x [m, k] of a problem, on the CPU: ``plain`` near N(0, 1), ``wide`` times 2^-8 to 2^3, ``exact`` -1, 0 and 1."""
    if values == "exact":
        return exact_activations(m, k, dtype=DTYPES[dtype], seed=seed)
    x = random_activations(m, k, dtype=DTYPES[dtype], seed=seed)
    if values == "plain":
        return x
    power = torch.randint(-8, 4, (m, k), generator=torch.Generator().manual_seed(seed + 1))
    return (x.double() * torch.pow(2.0, power.double())).to(x.dtype)


def cases() -> list[Case]:
    """The weights to record, small ones first; each with the numbers of tokens it is run on."""
    every = product((128, 64, 32, -1), ("awq", "gptq", "act_order"), DTYPES)
    kinds = [(d, f, g) for g, f, d in every if (f, g) != ("act_order", -1)]
    values = ("plain", "plain", "wide", "plain", "exact")
    out: list[Case] = []
    for i, (k, n) in enumerate(SMALL):
        for j, (dtype, form, group) in enumerate(kinds):
            if (i + j) % 3 == 0:
                c = len(out)
                tokens = tuple(sorted({TOKENS[(4 * c + t) % len(TOKENS)] for t in range(4)}))
                out.append(Case(k, n, group, dtype, form, values[c % 5], 1000 + 10 * c, tokens))
    for k, n in LARGE:
        for dtype, form in product(DTYPES, ("awq", "gptq")):
            out.append(Case(k, n, 128, dtype, form, "plain", 1000 + 10 * len(out), (1, 16, 64, 256)))
    out.append(Case(4096, 4096, 128, "fp16", "act_order", "plain", 1000 + 10 * len(out), (1, 16, 64, 256)))
    out.append(Case(4096, 4096, -1, "fp16", "gptq", "plain", 1000 + 10 * len(out), (1, 16, 64, 256)))
    return sorted(out, key=lambda c: c.K * c.N)


class Recorder:
    """Runs cases and keeps the two files up to date."""

    def __init__(self, out: Path, device: torch.device, chosen: list[Kernel]) -> None:
        found = extension()
        self.device, self.kernels = device, chosen
        self.json, self.npz = out / "silicon.json", out / "silicon.npz"
        built = {"missing": found.reason} if isinstance(found, Missing) else {"sha256": found.sha256, "version": found.version}
        self.result = Recording(SCHEMA, collect(), built, {k.name: k.version() for k in chosen}, CONVENTIONS)
        self.bits: list[np.ndarray] = []
        self.offset = 0
        self.known: dict[tuple[int, str], tuple[int, int]] = {}
        self.seen: set[tuple[str, str]] = set()
        self.start = self.written = time.monotonic()

    def write(self, complete: bool = False, every: float = 0.0) -> None:
        """Both files, unless they were written less than ``every`` seconds ago."""
        if time.monotonic() - self.written < every:
            return
        self.result.seconds, self.result.complete = time.monotonic() - self.start, complete
        buffer = io.BytesIO()
        np.savez(buffer, bits=np.concatenate(self.bits) if self.bits else np.zeros(0, np.uint16))
        write_whole(self.npz, buffer.getvalue())
        write_json(self.json, self.result)
        self.written = time.monotonic()

    def run(self, case: Case, deadline: float) -> None:
        """Every kernel on every input of one case, then the one-hot probe; stops between two inputs after ``deadline``."""
        cpu = make_weight(case)
        weight, refused, packs = cpu.to(self.device), {}, {}
        for kernel in self.kernels:
            support = kernel.supports(Problem.of(weight, case.tokens[0]), self.device)
            if not support.ok:
                refused[kernel.name] = support.reason
                continue
            try:
                packs[kernel], seconds = self._timed(partial(kernel.pack, weight))
                self._first(kernel, case, "pack", seconds)
            except Exception as error:
                refused[kernel.name] = self._reason(error, kernel)
        at = len(self.result.cases)
        self.result.cases.append({**asdict(case), "weight_digest": cpu.digest(), "refused": refused})
        exact = weight.dequantize(torch.float64)
        for t, m in enumerate(case.tokens):
            if time.monotonic() > deadline:
                return
            seed = case.seed + 100_000 * (t + 1)
            x = make_activations(case.values, m, case.K, case.dtype, seed)
            problem = len(self.result.problems)
            self.result.problems.append({"case": at, "M": m, "seed": seed, "input_digest": digest(x)})
            x = x.to(self.device)
            want = x.double() @ exact
            for kernel, packed in packs.items():
                try:
                    record = self._record(problem, kernel, case, partial(kernel.run, x, packed), want)
                except Exception as error:
                    record = {"problem": problem, "kernel": kernel.name, "reason": self._reason(error, kernel)}
                self.result.records.append(record)
        if case.K * case.N <= PROBE_ELEMENTS:
            for kernel, packed in packs.items():
                self._probe(at, kernel, packed, weight)

    def _record(self, problem: int, kernel: Kernel, case: Case, call: Callable[[], Tensor], want: Tensor) -> dict[str, Any]:
        y, seconds = self._timed(call)
        self._first(kernel, case, "run", seconds)
        repeatable = all(differing(y, call()) == 0 for _ in range(RUNS - 1))
        name = digest(y)
        return {
            "problem": problem,
            "kernel": kernel.name,
            "digest": name,
            "sample": self._sample(problem, name, y),
            "repeatable": repeatable,
            "error": moments(y, want).relative_l2,
            "finite": bool(torch.isfinite(y).all()),
        }

    def _sample(self, problem: int, name: str, y: Tensor) -> tuple[int, int]:
        """Where the sample lies; kernels that gave the same output share one."""
        if (problem, name) not in self.known:
            positions = torch.from_numpy(sample_positions(y.numel())).to(y.device)
            taken = y.contiguous().reshape(-1)[positions].view(torch.int16).cpu().numpy().view(np.uint16)
            self.bits.append(taken)
            self.known[problem, name] = (self.offset, len(taken))
            self.offset += len(taken)
        return self.known[problem, name]

    def _probe(self, at: int, kernel: Kernel, packed: Any, weight: Int4Weight) -> None:
        for rows in PROBE_ROWS:
            entry: dict[str, Any] = {"case": at, "kernel": kernel.name, "rows": rows}
            try:
                got = decode(kernel, packed, weight.K, weight.dtype, weight.device, rows)
                entry["result"] = judge(got, weight, kernel, weight.name, kernel.name)
            except Exception as error:
                entry["reason"] = self._reason(error, kernel)
            self.result.probes.append(entry)

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        failure.wait(self.device)
        start = time.monotonic()
        value = call()
        failure.wait(self.device)
        return value, time.monotonic() - start

    def _first(self, kernel: Kernel, case: Case, what: str, seconds: float) -> None:
        """Keep the first call of each kernel and dtype, and any slow one: there the driver compiled."""
        key = (f"{kernel.name} {what}", case.dtype)
        if key not in self.seen or seconds > 2:
            self.seen.add(key)
            self.result.first_calls.append({"kernel": kernel.name, "what": what, "dtype": case.dtype, "seconds": seconds})

    def _reason(self, error: Exception, kernel: Kernel) -> str:
        """The error's text. A GPU that no longer answers ends the run, with what was recorded written."""
        try:
            return failure.reason(error, kernel.name, self.device)
        except QlabError as dead:
            self.write()
            raise SystemExit(str(dead)) from error


SUM_ORDERS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "(((P0+P4)+(P1+P5))+(P2+P6))+(P3+P7)": lambda p: (((p[0] + p[4]) + (p[1] + p[5])) + (p[2] + p[6])) + (p[3] + p[7]),
    "P0+P1+...+P7 in turn": lambda p: ((((((p[0] + p[1]) + p[2]) + p[3]) + p[4]) + p[5]) + p[6]) + p[7],
    "((P0+P1)+(P2+P3))+((P4+P5)+(P6+P7))": lambda p: ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])),
    "((P0+P4)+(P2+P6))+((P1+P5)+(P3+P7))": lambda p: ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])),
}
"""Orders in which ``torch.sum(0)`` may join awq_gemm's eight partial sums, each in fp32."""


def partial_sums(m: int, n: int, seed: int) -> Tensor:
    """fp16 [8, m, n] over many binades, the last nearly minus the sum of the others: what remains is the order's rounding."""
    x = make_activations("wide", 8 * m, n, "fp16", seed).reshape(8, m, n).double()
    power = torch.randint(-10, 1, x.shape, generator=torch.Generator().manual_seed(seed + 2))
    p = (x * torch.pow(2.0, power.double())).half()
    p[7] = (-p[:7].double().sum(0)).half()
    return p


def sum_order(device: torch.device) -> Iterator[dict[str, Any]]:
    """For each output shape, how many results of ``torch.sum(0)`` over 8 fp16 partials differ from each order's."""
    for i, (m, n) in enumerate(((1, 64), (1, 4096), (3, 192), (16, 1024), (16, 4096), (255, 4096), (64, 28672))):
        p = partial_sums(m, n, 77 + i).to(device)
        y = p.sum(0)
        counts = {name: differing(y, order(list(p.float())).half()) for name, order in SUM_ORDERS.items()}
        yield {"M": m, "N": n, "outputs": m * n, "differing": counts}


def argsort_stable(device: torch.device) -> Iterator[dict[str, Any]]:
    """Whether ``torch.argsort`` keeps the order of rows within a group, for group indices as act-order makes them."""
    for k, g in ((256, 32), (512, 128), (1024, 64), (2048, 32), (4096, 128), (14336, 128), (28672, 64)):
        index = random_weight(k, 8, g, symmetric=True, act_order=True, seed=k).group_index.to(device)
        stable = torch.argsort(index, stable=True)
        yield {"K": k, "group_size": g, "moved": int((torch.argsort(index) != stable).sum())}


def _name(case: Case) -> str:
    return f"{case.form} K={case.K} N={case.N} g={case.group_size} {case.dtype} {case.values}"


def _chosen(names: str, without: str) -> list[Kernel]:
    """Registered kernels whose name is, or begins with, one of ``names``."""
    wanted, unwanted = tuple(names.split(",")), set(without.split(","))
    return [k for k in kernels() if k.name.startswith(wanted) and k.name not in unwanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--minutes", type=float, default=12.0, help="start no further problem after so many minutes")
    parser.add_argument("--kernels", default="vllm.", help="names or beginnings of names, comma-separated")
    parser.add_argument("--without", default="", help="kernels to leave out, comma-separated")
    parser.add_argument("--sum-order", action="store_true", help="also check torch.sum's order and argsort's stability")
    parser.add_argument("--limit", type=int, help="only the first so many weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    chosen = _chosen(options.kernels, options.without)
    if not chosen:
        parser.error(f"--kernels {options.kernels} names no kernel; known: {', '.join(k.name for k in kernels())}")
    if options.device == "cpu" and all(k.name.startswith("vllm.") for k in chosen):
        parser.error("vLLM's kernels need a CUDA GPU; PyTorch finds none here, or --device says cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(options.out, torch.device(options.device), chosen)
    deadline = recorder.start + 60 * options.minutes
    if options.sum_order:
        recorder.result.sum_order = list(sum_order(recorder.device))
        recorder.result.argsort = list(argsort_stable(recorder.device))
    todo = cases()[: options.limit]
    for i, case in enumerate(todo):
        if time.monotonic() > deadline:
            break
        print(f"[{time.monotonic() - recorder.start:6.1f} s] {i + 1}/{len(todo)} {_name(case)} M={case.tokens}", flush=True)
        recorder.run(case, deadline)
        recorder.write(every=5.0)
    recorder.write(complete=time.monotonic() <= deadline)
    r = recorder.result
    print(f"{len(r.records)} records of {len(r.problems)} problems in {r.seconds:.0f} s: {recorder.json}, {recorder.npz}")


if __name__ == "__main__":
    main()
