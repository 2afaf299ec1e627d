"""Count differing bits for what is claimed of the CUDA and Triton kernels, whole outputs on this GPU.

    QLAB_VLLM_EXTENSION=/path/_C.so python -m bench.prove_kernels --out results/GPU/kernels.json [--seconds 150]

Six parts, each in a process of its own and side by side: ``marlin``, cuda.marlin against vLLM's marlin_gemm and, in a second
process without vLLM, against its saved outputs (``*-marlin.json``, and ``*-marlin-small.json`` for the tests); ``batch``,
rows of cuda.batch_invariant in any batch; ``hardware``, cuda.hardware_invariant against two CPU engines; ``stripes``, other
SM counts, L = 8 and hybrids on this GPU's tensor cores; ``split`` and ``triton``, cuda.split and triton.w4a16 against their
replays. What time did not allow is listed. Exit status 1 where a bit differs, a problem fails or a part has compared nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.kernel_proof import batch, hardware, marlin, saved, split, stripes
from bench.kernel_proof.place import Place, poisons
from bench.kernel_proof.tally import SCHEMA, Failure, Part, Result, Tally, show
from qlab.backends.vllm_extension import Missing, extension
from qlab.environment import collect
from qlab.errors import QlabError
from qlab.hardware import detect
from qlab.replay import missing
from qlab.serial import write_json

PARTS = ("marlin", "batch", "hardware", "stripes", "split", "triton")
GRACE = 100.0
"""Seconds that a part may take beyond its time before it is ended: start, and what was begun."""


def work(name: str, place: Place, tally: Tally, out: Path) -> None:
    """One part; ``out`` is the whole result's file, beside which parts leave theirs."""
    try:
        if not poisons(place.device):
            tally.skip("fresh memory is not NaN on this PyTorch")
        if name == "marlin":
            if isinstance(found := extension(), Missing):
                raise QlabError(f"vLLM's kernels: {found.reason}")
            marlin.prove(place, tally, saved_path(out))
        elif name == "batch":
            batch.prove(place, tally)
        elif name == "hardware":
            hardware.prove(place, tally)
        elif name == "stripes":
            stripes.prove(place, tally)
        else:
            with tempfile.TemporaryDirectory() as folder:
                split.prove(place, tally, Path(folder), split.NAMES[:1] if name == "split" else split.NAMES[1:])
    except Exception as error:  # what was found before is kept
        tally.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    tally.write(now=True)


def saved_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}-marlin.json")


def check(path: Path, place: Place, tally: Tally, kernel: str, claim: str, runs: int) -> None:
    """The second process: no extension of vLLM, before and after."""
    try:
        for when in ("before", "after"):
            if kernel == marlin.OURS and (loaded := saved.vllm_loaded()):
                tally.fail(Failure(claim, "", f"{loaded}, {when} the comparison"))
            if when == "before":
                saved.check(place, tally, saved.load(path), kernel, claim, runs)
    except Exception as error:
        tally.error = f"{type(error).__name__}: {error}"
    tally.write(now=True)


def gather(parts: list[str], out: Path, arguments: list[str], seconds: float) -> tuple[Part, ...]:
    """Every part as a process of its own, side by side."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for name in parts:
            command = [sys.executable, "-m", "bench.prove_kernels", "--worker", name, "--out", str(out), *arguments]
            with (Path(folder) / f"{name}.log").open("w") as log:
                command += ["--file", str(Path(folder) / f"{name}.json")]
                running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + seconds + GRACE
        for name, process in running.items():
            error = ""
            try:
                process.wait(max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                error = f"had not ended after {seconds + GRACE:.0f} s"
            file = Path(folder) / f"{name}.json"
            part = saved.part_of(file) if file.exists() else Part(name)
            if process.returncode or not file.exists():
                log_lines = (Path(folder) / f"{name}.log").read_text(errors="replace").splitlines()
                error = error or f"ended with status {process.returncode}: {' | '.join(log_lines[-3:])}"
            found.append(Part(**{**vars(part), "error": part.error or error}))
    return tuple(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result's JSON file")
    parser.add_argument("--seconds", type=float, default=150, help="start no further problem after so long")
    parser.add_argument("--problems", type=int, default=600, help="of a part, at most; batch has a list of its own")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    for internal in ("--worker", "--file", "--kernel", "--claim"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    began, gpu = time.monotonic(), detect()
    if gpu is None:
        parser.error("the kernels need a CUDA GPU, and PyTorch finds none here")
    place = Place(torch.device("cuda", torch.cuda.current_device()), gpu, options.seconds, options.problems)
    if options.check:
        check(options.check, place, Tally("second process", options.out), options.kernel, options.claim, options.runs)
        return 0
    if options.worker:
        work(options.worker, place, Tally(options.worker, Path(options.file)), options.out)
        return 0
    if why := missing("cuda"):
        parser.error(f"the cuda engine cannot run: {why}")
    parts = options.part or list(PARTS)
    found = extension()
    build = f"vLLM's extension: {found.reason}" if isinstance(found, Missing) else str(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--seconds", str(options.seconds), "--problems", str(options.problems)]
    done = gather(parts, options.out, arguments, options.seconds)
    result = Result(SCHEMA, gpu.key, collect(details=False), build, time.monotonic() - began, done)
    write_json(options.out, result)
    show(result)
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
