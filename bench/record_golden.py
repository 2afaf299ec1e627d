"""Record whole outputs of the real kernels on small problems: the golden file that every replay is held to, bit by bit.

    QLAB_VLLM_EXTENSION=/path/_C.so python -m bench.record_golden --out tests/golden

QLAB_VLLM_SOURCE=/path/awq_triton.py adds vLLM's Triton kernel where vLLM is not installed. Writes ``golden.npz`` (array
``bits``: uint16 patterns of the outputs stored, one record after the other) and ``golden.json`` (environment, build, problems
with the digests of their inputs, one record per problem and kernel, and the sha256 of the npz). The inputs are made again by
``bench.problems.inputs``. Kernels that gave one problem the same output share its bits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.golden_plan import Planned, plan
from bench.problems import Trial, call, inputs, not_modelled
from qlab.backends import failure
from qlab.backends.registry import Kernel, kernels
from qlab.backends.vllm_extension import Missing, extension
from qlab.compare import differing, digest
from qlab.environment import Environment, collect
from qlab.errors import QlabError
from qlab.hardware import Gpu, detect
from qlab.recipes import builders, recipe
from qlab.replay.operands import bits
from qlab.serial import read_json, write_json, write_whole

SCHEMA = "qlab.golden/1"
RUNS = 3
Bits = NDArray[np.uint16]
CONVENTIONS = {
    "digest": "qlab.compare.digest: sha256 of dtype, shape and bytes of the whole output",
    "stored": "columns 0, stride, 2 stride, ... of every row, row by row, from offset on",
    "repeatable": f"whether {RUNS} runs gave the same bits; the first one is recorded",
}


@dataclass(frozen=True)
class Record:
    """What one kernel gave."""

    kernel: str
    digest: str
    repeatable: bool
    offset: int
    """Where its stored outputs begin in ``bits``."""


@dataclass(frozen=True)
class Recorded:
    """One problem and its records."""

    trial: Trial
    why: str
    weight_digest: str
    input_digest: str
    bias_digest: str
    """Empty without a bias."""
    stride: int
    """Every so-many-th column is stored."""
    records: tuple[Record, ...]

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns stored of each record."""
        return self.trial.M, len(range(0, self.trial.N, self.stride))


@dataclass(frozen=True)
class Golden:
    schema: str
    gpu: str
    """Key in qlab's table of the GPU that recorded."""
    environment: Environment
    extension: dict[str, str]
    """Version and sha256 of vLLM's extension."""
    kernels: dict[str, str]
    """Build of each kernel."""
    conventions: dict[str, str]
    npz_sha256: str
    seconds: float
    problems: tuple[Recorded, ...]
    failed: tuple[str, ...] = ()
    """Kernels that raised, with their problems."""


def load(folder: Path) -> tuple[Golden, Bits]:
    """A recording and its bits. Raises QlabError unless the two files belong together and every record is in them."""
    golden = read_json(Golden, folder / "golden.json", SCHEMA)
    path = folder / "golden.npz"
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != golden.npz_sha256:
        raise QlabError(f"{path} has sha256 {found[:16]}..., and golden.json was written with {golden.npz_sha256[:16]}...")
    stored: Bits = np.load(io.BytesIO(data))["bits"]
    for problem in golden.problems:
        rows, columns = problem.stored
        for record in problem.records:
            if not 0 <= record.offset <= len(stored) - rows * columns:
                raise QlabError(f"{path} lacks the outputs of {record.kernel} on {problem.trial}")
    return golden, stored


def save(folder: Path, golden: Golden, stored: Bits) -> Golden:
    """Both files, the npz first; the digest of the npz is put into the JSON."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, bits=stored)
    golden = replace(golden, npz_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    write_whole(folder / "golden.npz", buffer.getvalue())
    write_json(folder / "golden.json", golden)
    return golden


class Recorder:
    """Runs planned problems on one device."""

    def __init__(self, gpu: Gpu, device: torch.device, chosen: Sequence[Kernel]) -> None:
        self.gpu, self.device = gpu, device
        self.kernels = [k for k in chosen if k.name in builders()]
        self.parts: list[Bits] = []
        self.length = 0
        self.problems: list[Recorded] = []
        self.failed: list[str] = []
        self.counts: Counter[str] = Counter()
        self.start = time.monotonic()

    def run(self, planned: Planned) -> None:
        """Every kernel that the plan names, that runs the problem and whose recipe makes a claim for it."""
        trial = planned.trial
        made = inputs(trial)
        weight, x = made.weight.to(self.device), made.x.to(self.device)
        bias = None if made.bias is None else made.bias.to(self.device)
        problem = trial.problem(made.weight)
        known: dict[str, int] = {}
        records = []
        for kernel in self.kernels:
            if not kernel.name.startswith(planned.kernels) or not kernel.supports(problem, self.device).ok:
                continue
            try:
                said = recipe(kernel.name, problem, self.gpu)
            except QlabError:  # a bias and atomics
                continue
            if not_modelled(kernel.name, trial, said) or not (said.ordered or kernel.name == "vllm.gptq_gemm"):
                continue
            try:
                packed = kernel.pack(weight)
                y = call(kernel, packed, x, bias)
                failure.wait(self.device)
                again = [differing(y, call(kernel, packed, x, bias)) == 0 for _ in range(RUNS - 1)]
            except Exception as error:
                self.failed.append(f"{kernel.name} on {trial}: {failure.reason(error, kernel.name, self.device)}")
                continue
            name = digest(y)
            if name not in known:
                known[name] = self._store(y[:, :: planned.stride])
            records.append(Record(kernel.name, name, all(again), known[name]))
            self.counts[kernel.name] += 1
        self.problems.append(
            Recorded(
                trial,
                planned.why,
                made.weight.digest(),
                digest(made.x),
                "" if made.bias is None else digest(made.bias),
                planned.stride,
                tuple(records),
            )
        )

    def _store(self, y: Tensor) -> int:
        offset = self.length
        self.parts.append(bits(y).ravel())
        self.length += y.numel()
        return offset

    def result(self) -> tuple[Golden, Bits]:
        found = extension()
        built = {"missing": found.reason} if isinstance(found, Missing) else {"sha256": found.sha256, "version": found.version}
        golden = Golden(
            SCHEMA,
            self.gpu.key,
            collect(),
            built,
            {k.name: k.version() for k in self.kernels if self.counts[k.name]},
            CONVENTIONS,
            "",
            time.monotonic() - self.start,
            tuple(p for p in self.problems if p.records),
            tuple(self.failed),
        )
        return golden, np.concatenate(self.parts) if self.parts else np.zeros(0, np.uint16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for golden.json and golden.npz")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    options = parser.parse_args()
    gpu = detect()
    if gpu is None:
        parser.error("the kernels need a CUDA GPU, and PyTorch finds none here")
    if isinstance(found := extension(), Missing):
        parser.error(f"vLLM's kernels: {found.reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(gpu, torch.device("cuda"), kernels())
    todo = plan()[: options.limit]
    for i, planned in enumerate(todo):
        try:
            recorder.run(planned)
        except QlabError as dead:  # the GPU no longer answers; what was recorded is kept
            recorder.failed.append(str(dead))
            break
        if i % 10 == 0 or i + 1 == len(todo):
            passed = time.monotonic() - recorder.start
            print(f"[{passed:6.1f} s] {i + 1}/{len(todo)} {planned.why}: {planned.trial}", flush=True)
    golden = save(options.out, *recorder.result())
    size = (options.out / "golden.npz").stat().st_size / 1e6
    print(f"{len(golden.problems)} problems, {sum(recorder.counts.values())} records, {recorder.length} outputs, {size:.1f} MB")
    for name, count in sorted(recorder.counts.items()):
        print(f"  {name:28} {count}")
    for line in golden.failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if golden.failed else 0


if __name__ == "__main__":
    sys.exit(main())
