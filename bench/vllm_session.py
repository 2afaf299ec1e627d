"""What needs vLLM's own engine and a GPU, in one call of a few minutes: tables, traces, proofs to commit under ``results/``.

    python -m bench.vllm_session --out results/h200/vllm --hw h200 --minutes 9

Each step is a process with its own time limit, as in ``bench.gpu_session``; all of them together keep to ``--minutes``.
Finished runs are kept, so the same command, or ``--only`` with a step's name, goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu_session import SCHEMA, Outcome, Session, Step, has_gpu, run
from qlab.environment import collect
from qlab.serial import read_json, write_json

RESERVE = 3
"""Seconds at the end for the record."""
LEAST = 20
"""Seconds that a step must have left to be started."""
LARGE = "awq,awq_marlin,gptq,gptq_marlin,awq_marlin:vllm,gptq_marlin:vllm"


def steps(hw: str, out: Path, scratch: Path, layers: int, gpus: int) -> list[Step]:
    """The session's steps, in the order of their worth."""
    experiment = ("bench.vllm_experiment", "--hw", hw)
    large = ("--awq", f"{scratch}/awq", "--gptq", f"{scratch}/gptq", "--prompts", f"{scratch}/prompts.json")
    pair = ("--methods", "awq,awq_marlin", "--no-traces")
    listed = [
        Step("shipped", (*experiment, "--out", f"{out}/shipped", "--digests"), 200),
        Step(
            "bits",
            ("bench.native_replay", "--hw", hw, "--traces", f"{out}/shipped/traces", "--json", f"{out}/native-replay.json"),
            90,
        ),
        Step("attention", (*experiment, "--out", f"{out}/attention", *pair, "--against", "attention=TRITON_ATTN"), 110),
        Step("random-model", ("bench.random_model", "--out", str(scratch), "--layers", str(layers)), 90),
        Step(
            "large",
            (*experiment, "--out", f"{out}/large", "--methods", LARGE, *large, "--count", "8", "--rows", "4"),
            260,
        ),
        Step("builtin", (*experiment, "--out", f"{out}/builtin", "--engine", "builtin", "--no-traces"), 120),
    ]
    if gpus > 1:
        listed += [
            Step("parallel", (*experiment, "--out", f"{out}/parallel", *pair, "--against", "gpus=2"), 120),
            Step("large-parallel", (*experiment, "--out", f"{out}/large-parallel", *pair, *large, "--against", "gpus=2"), 160),
        ]
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, traces and logs")
    parser.add_argument("--hw", default="h100", help="key of this GPU in qlab's table")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "qlab-random-model", help="folder of the large model"
    )
    parser.add_argument("--layers", type=int, default=32, help="of the large model")
    parser.add_argument("--only", help="comma-separated step names")
    args = parser.parse_args()
    if not has_gpu():
        parser.error("PyTorch finds no CUDA GPU here, and every step needs one")
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = steps(args.hw, args.out, args.scratch, args.layers, torch.cuda.device_count())
    if args.only:
        names = args.only.split(",")
        if unknown := sorted(set(names) - {s.name for s in chosen}):
            parser.error(f"--only {unknown[0]}: no such step; steps are {', '.join(s.name for s in chosen)}")
        chosen = [s for s in chosen if s.name in names]
    return follow(chosen, args.out, time.monotonic() + 60 * args.minutes - RESERVE)


def follow(chosen: list[Step], out: Path, end: float) -> int:
    """Run the steps one after another until ``end``, on the clock of ``time.monotonic``; record how each ended."""
    record, environment = out / "session.json", collect()
    before = read_json(Session, record, SCHEMA).steps if record.exists() else ()
    outcomes: list[Outcome] = []
    for step in chosen:
        left = int(end - time.monotonic())
        if left < LEAST:
            print(f"{step.name:12} no time left", flush=True)
            continue
        outcomes.append(run(replace(step, seconds=min(step.seconds, left)), out))
        kept = [o for o in before if o.name not in {done.name for done in outcomes}]
        write_json(record, Session(SCHEMA, environment, (*kept, *outcomes)))
    return 1 if len(outcomes) < len(chosen) or any(o.status for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
