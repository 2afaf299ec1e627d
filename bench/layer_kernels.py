"""Which kernels the layers' benchmark takes: cuBLAS, the registry's and the peers of other libraries, by globs."""

from __future__ import annotations

import fnmatch

import torch

from bench.gemm import Dense
from bench.peers import Peer, peers
from qlab.backends.registry import Kernel, Problem, kernels
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import Gpu
from qlab.recipes import builders, recipe

OURS = ("cuda.*", "triton.w4a16*")
"""Globs over this project's kernels that are to be fast."""
TRITON = ("triton.w4a16*",)
MARLIN = ("vllm.marlin.awq", "vllm.marlin.gptq")
MACHETE = ("vllm.machete.*",)
STRONGEST = (*MARLIN, *MACHETE, "vllm.gptq_gemm")
"""Marlin, Machete (its own choice and its fastest schedule) and ExLlama: the best of them is what counts."""
DEFAULT = (*STRONGEST, "vllm.awq_gemm", "vllm.awq_triton", "vllm.awq_dequantize", *OURS, "peers")
"""``peers`` stands for every kernel of bench.peers."""

MOST_ROWS = {"cuda.hardware_invariant": 128}
"""Rows beyond which a kernel is not timed: far behind every other one there, it would take most of the time."""


def matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, g) for g in globs)


def dense(device: torch.device) -> str:
    """Name of the library product on the dequantised weight: cuBLAS on a GPU."""
    return Dense(device).name


def choose(globs: str | None, device: torch.device, without: str = "") -> tuple[Kernel, ...]:
    """The library product first, then every kernel that matches a comma-separated glob and none of ``without``.

    Raises QlabError for a glob that was asked for and matches nothing; the default ones may.
    """
    known: dict[str, Kernel] = {k.name: k for k in (*kernels(), *peers())}
    asked = tuple(g.strip() for g in globs.split(",")) if globs else DEFAULT
    left = tuple(g.strip() for g in without.split(",") if g.strip())
    chosen: dict[str, Kernel] = {}
    for glob in asked:
        found = {p.name: p for p in peers()} if glob == "peers" else {n: k for n, k in known.items() if matches(n, (glob,))}
        if not found and globs:
            raise QlabError(f"--kernels {glob!r} matches nothing; known: {', '.join(sorted(known))}, peers")
        chosen |= found
    first = Dense(device)
    return (first, *(k for name, k in chosen.items() if not matches(name, left)))


def dtype_of(kernel: Kernel, run: torch.dtype) -> torch.dtype:
    """The dtype that a kernel is timed in: the run's, but for a peer that has only one."""
    return kernel.dtype or run if isinstance(kernel, Peer) else run


def beyond(kernel: Kernel, m: int) -> str:
    """Why a kernel is not timed at so many rows; empty where it is."""
    most = MOST_ROWS.get(kernel.name, m)
    return f"not timed beyond {most} rows" if m > most else ""


def overlaps(kernel: Kernel, device: torch.device) -> bool:
    """Whether the kernel's launches may begin before the kernel before them ends (programmatic dependent launch)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return bool(getattr(kernel, "overlap", type(kernel).__module__ == "qlab.backends.cuda_int4"))


def recipe_of(kernel: Kernel, problem: Problem, gpu: Gpu | None) -> str:
    """Hash of the kernel's recipe; ``opaque: NAME`` where it has none or cuBLAS is part of it; empty without a GPU's name."""
    if kernel.name not in builders():
        what = "cuBLAS of " if kernel.name in ("cublas", "matmul") else f"{kernel.name}, "
        return f"opaque: {what}{kernel.version()}".removesuffix(", ")
    if gpu is None:
        return ""
    try:
        found = recipe(kernel.name, problem, gpu)
        return f"opaque: {found.opaque}, {found.hash}" if found.opaque else found.hash
    except UnsupportedError as e:
        return f"opaque: {e}"
