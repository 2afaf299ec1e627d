"""Digests of outputs, written by one process and held against what another one computes on the same inputs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.kernel_proof.inputs import Trial, activations, fingerprint, weight
from bench.kernel_proof.place import Place
from bench.kernel_proof.tally import Failure, Part, Tally
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_extension import EXTENSION_VARIABLE
from qlab.compare import digest
from qlab.serial import from_plain, read_json
from qlab.weights import DTYPES, Int4Weight

SCHEMA = "qlab.bench.saved-outputs/1"
STORED = 2048
"""Outputs of a problem up to which their bits are stored beside the digest."""


@dataclass(frozen=True)
class Record:
    """One output."""

    trial: Trial
    inputs: str
    """Fingerprint of x and the weight."""
    digest: str
    """qlab.compare.digest of y."""
    bits: str = ""
    """y's 16-bit patterns, little-endian, deflated, in base64; of a few small outputs."""


@dataclass(frozen=True)
class Saved:
    """Outputs of one kernel, or of one that others are to equal."""

    schema: str
    gpu: str
    """Key in qlab.hardware."""
    source: str
    """What computed them, with its build."""
    records: tuple[Record, ...]


def record(trial: Trial, x: Tensor, w: Int4Weight, y: Tensor, bits: bool = False) -> Record:
    """``bits``: whether y itself is stored where it is small."""
    return Record(trial, fingerprint(x, w), digest(y), encoded(y) if bits and y.numel() <= STORED else "")


def encoded(y: Tensor) -> str:
    raw = y.detach().cpu().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def decoded(text: str, trial: Trial) -> Tensor:
    """y [M, N]."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i2").reshape(trial.M, trial.N)
    return torch.from_numpy(raw.astype(np.int16)).view(DTYPES[trial.dtype])


def check(place: Place, tally: Tally, saved: Saved, name: str, claim: str, runs: int = 1) -> None:
    """Kernel ``name`` on the inputs of every record, ``runs`` times: each output's digest is the one saved."""
    kernel = place.kernel(name)
    tally.kernels[name] = kernel.version()
    ready = lru_cache(maxsize=1)(lambda t: _packed(place, name, t))
    for number, r in enumerate(saved.records):
        if place.over():
            tally.skip(f"{claim}: no time left", len(saved.records) - number)
            return
        with tally.guard(claim, r.trial):
            w, packed = ready(r.trial.rows(0))
            x = activations(r.trial, place.device)
            if fingerprint(x, w) != r.inputs:
                tally.fail(Failure(claim, str(r.trial), "the inputs were not made again bit for bit"))
                continue
            for _ in range(runs):
                y = place.run(kernel, x, packed)
                if digest(y) == r.digest:
                    tally.claim(claim, outputs=y.numel())
                elif r.bits:
                    tally.compare(claim, r.trial, y, decoded(r.bits, r.trial).to(y.device))
                    break
                else:
                    tally.claim(claim, outputs=y.numel(), differing_problems=1)
                    tally.fail(Failure(claim, str(r.trial), "its digest is not the one saved", y.numel()))
                    break
            tally.claim(claim, problems=1)
            tally.write()
    tally.complete = True


def _packed(place: Place, name: str, trial: Trial) -> tuple[Int4Weight, Packed]:
    w = weight(trial, place.device)
    support = place.kernel(name).supports(Problem.of(w, 1), place.device)
    if not support.ok:
        raise RuntimeError(f"{name}: {support.reason}")
    return w, place.kernel(name).pack(w)


def vllm_loaded() -> str:
    """What of vLLM is in this process; empty where nothing is."""
    if "vllm" in sys.modules or "vllm._C" in sys.modules:
        return "vllm was imported"
    return "an operator marlin_gemm is loaded" if hasattr(torch.ops._C, "marlin_gemm") else ""


Check = Callable[[Path, Path, list[str], float], str]
"""Checks a saved file and writes a part: (saved, part, arguments, seconds) to an error, empty where all went well."""


def in_another_process(saved: Path, part: Path, arguments: list[str], seconds: float) -> str:
    """``python -m bench.prove_kernels --check`` with no extension of vLLM named."""
    environment = {k: v for k, v in os.environ.items() if k != EXTENSION_VARIABLE}
    command = [sys.executable, "-m", "bench.prove_kernels", "--check", str(saved), "--out", str(part), *arguments]
    try:
        ended = subprocess.run(
            [*command, "--seconds", f"{seconds:.0f}"], env=environment, capture_output=True, text=True, timeout=seconds + 60
        )
    except subprocess.TimeoutExpired:
        return f"the second process had not ended after {seconds + 60:.0f} s"
    if part.exists():
        return ""
    return f"the second process ended with status {ended.returncode}: {ended.stderr.strip()[-300:]}"


def take_in(tally: Tally, path: Path, error: str) -> None:
    """Add what a second process found to this one's part."""
    if path.exists():
        found = part_of(path)
        for c in found.claims:
            tally.claim(**vars(c))
        for reason, count in found.left_out.items():
            tally.skip(reason, count)
        for what, count in found.facts.items():
            tally.fact(what, count)
        for f in found.details:
            tally.fail(f)
        tally.failures += found.failures - len(found.details)
        error = error or found.error
    if error:
        tally.fail(Failure("second process", "", error))
        tally.error = tally.error or error


def part_of(path: Path) -> Part:
    """A part's file as it was last written."""
    return from_plain(Part, json.loads(path.read_text()), str(path))


def load(path: Path) -> Saved:
    """Raises QlabError for a file that is none."""
    return read_json(Saved, path, SCHEMA)
