"""Everything that needs a GPU, in one call: tests, the lab, recordings, proofs, timings; JSON to commit under ``results/``.

    QLAB_VLLM_EXTENSION=/path/_C.abi3.so python -m bench.gpu_session --out results/h100 --hw h100

Each step is a process of its own with its own time limit, so that a step that fails or hangs costs nothing but itself.
``session.json`` says how each ended. Start again with ``--only`` to repeat single steps; what the others left stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gemm import GPU_SHAPES
from qlab.environment import Environment, collect
from qlab.serial import read_json, write_json

SCHEMA = "qlab.session/1"
SHAPES = [",".join(map(str, shape)) for shape in GPU_SHAPES]
REVEALED = (
    *(("marlin_gptq", "1,4096,4096", "fp16"), ("marlin_gptq", "1,4096,4096", "bf16"), ("marlin_awq", "16,4096,6144", "fp16")),
    *(("machete_awq", "16,14336,4096", "fp16"), ("machete_gptq", "1,4096,4096", "fp16"), ("awq_gemm", "1,4096,4096", "fp16")),
    *(("gptq", "1,4096,4096", "fp16"), ("awq_triton", "1,4096,4096", "fp16")),
    *(("triton.awq_gemm.splitk", "16,4096,4096", "fp16"), ("torch.matmul", "256,4096,4096", "fp16")),
)
"""(kernel, shape, dtype) whose order of summation is found from outside; each a step of its own."""


@dataclass(frozen=True)
class Step:
    """One command of the session."""

    name: str
    arguments: tuple[str, ...]
    """Behind ``python -m``."""
    seconds: int
    """Time limit."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended; its output is in ``NAME.log``."""

    name: str
    command: str
    status: int
    """Exit status; -1 when it ran out of time."""
    seconds: float


@dataclass(frozen=True)
class Session:
    schema: str
    environment: Environment
    steps: tuple[Outcome, ...]


def steps(hw: str, out: Path, minutes: float) -> list[Step]:
    """The session's steps, in the order of their worth."""
    lab = ("qlab.kernels", "--hw", hw, "--runs", "5")
    recording = int(minutes * 60) + 60
    shapes = tuple(part for shape in SHAPES for part in ("--shape", shape))
    return [
        Step("model-same", (*lab, "--probe", "--json", f"{out}/model-same.json", "--plot", f"{out}/model-same.png"), 150),
        Step("model-own", (*lab, "--weights", "own", "--json", f"{out}/model-own.json", "--plot", f"{out}/model-own.png"), 90),
        Step("model-bf16", (*lab, "--dtype", "bf16", "--probe", "--json", f"{out}/model-bf16.json"), 90),
        Step("shapes", (*lab, *shapes, "--json", f"{out}/shapes.json"), 150),
        Step("ladder", ("bench.climb_ladder", "--json", f"{out}/ladder.json"), 150),
        Step("tests", ("pytest", "-q", "-m", "gpu or vllm", "tests", "-p", "no:cacheprovider"), 240),
        Step(
            "silicon",
            ("bench.record_silicon", "--out", str(out), "--minutes", str(minutes), "--sum-order"),
            recording,
        ),
        Step("gemm", ("bench.gemm", "--json", f"{out}/gemm.json"), 200),
        Step("golden", ("bench.record_golden", "--out", f"{out}/golden"), 150),
        Step("proof", ("bench.prove_replay", "--out", str(out), "--processes", "8", "--seconds", "300"), 420),
        Step("step", ("bench.prove_step", "--json", f"{out}/step.json", "--speed"), 300),
        Step("replay", ("bench.replay", "--json", f"{out}/replay.json"), 200),
        *(_reveal(kernel, shape, dtype, out) for kernel, shape, dtype in REVEALED),
    ]


def _reveal(kernel: str, shape: str, dtype: str, out: Path) -> Step:
    name = f"{kernel}-{shape.replace(',', '-')}-{dtype}"
    arguments = ("qlab.reveal", kernel, "--shape", shape, "--dtype", dtype, "--json", f"{out}/reveal/{name}.json")
    return Step(f"reveal-{name}", arguments, 60)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, figures and logs")
    parser.add_argument("--hw", default="h100", help="key of this GPU in qlab's table")
    parser.add_argument("--minutes", type=float, default=5.0, help="for the recordings")
    parser.add_argument("--only", help="comma-separated step names")
    args = parser.parse_args()
    if not has_gpu():
        parser.error("PyTorch finds no CUDA GPU here, and every step needs one; .ci/run checks what needs none")
    (args.out / "reveal").mkdir(parents=True, exist_ok=True)
    chosen = steps(args.hw, args.out, args.minutes)
    if args.only:
        names = args.only.split(",")
        if unknown := sorted(set(names) - {s.name for s in chosen}):
            parser.error(f"--only {unknown[0]}: no such step; steps are {', '.join(s.name for s in chosen)}")
        chosen = [s for s in chosen if s.name in names]
    record, environment = args.out / "session.json", collect()
    before = read_json(Session, record, SCHEMA).steps if args.only and record.exists() else ()
    outcomes: list[Outcome] = []
    for step in chosen:
        outcomes.append(run(step, args.out))
        kept = [o for o in before if o.name not in {done.name for done in outcomes}]
        write_json(record, Session(SCHEMA, environment, (*kept, *outcomes)))
    return 1 if any(o.status for o in outcomes) else 0


def run(step: Step, out: Path) -> Outcome:
    """Run one step, its output to ``NAME.log``; say how it ended."""
    started, log = time.monotonic(), out / f"{step.name}.log"
    with log.open("w") as f:
        try:
            command = [sys.executable, "-m", *step.arguments]
            status = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, timeout=step.seconds).returncode
        except subprocess.TimeoutExpired:
            status = -1
    seconds = round(time.monotonic() - started, 1)
    print(f"{step.name:12} {'ok' if status == 0 else f'status {status}':10} {seconds:6.1f} s", flush=True)
    if status:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return Outcome(step.name, "python -m " + " ".join(step.arguments), status, seconds)


if __name__ == "__main__":
    sys.exit(main())
