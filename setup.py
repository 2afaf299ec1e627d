"""Build of qlab: the package list, the folder of Triton kernels and the compiled module. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Listed one by one because kernels/ must not become a package of its own (see qlab/__init__.py).
# tests/test_install.py compares the built wheel with the folders, so a forgotten line fails there.
PACKAGES = [
    "qlab",
    "qlab.attribution",
    "qlab.backends",
    "qlab.checkpoint",
    "qlab.data",
    "qlab.engine",
    "qlab.gemm",
    "qlab.kernels",
    "qlab.lab",
    "qlab.layers",
    "qlab.logprobs",
    "qlab.logprobs.commands",
    "qlab.packing",
    "qlab.quantize",
    "qlab.recipes",
    "qlab.replay",
    "qlab.report",
    "qlab.reveal",
    "qlab.triton_kernels",
]

NATIVE = Pybind11Extension(
    "qlab._native",
    ["csrc/native.cpp", *sorted(str(p) for p in Path("csrc").glob("chain_*.cpp"))],
    depends=sorted(str(p) for p in Path("csrc").glob("*.hpp")),
    cxx_std=17,
    # Replayed arithmetic must be the written one: no contraction into fused multiply-adds, no reordering. No -march either:
    # each chain_*.cpp names its instruction set itself, and the processor that runs it is asked for it first.
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--fmad=false", "--threads=0", "-Xcompiler=-fPIC"]
ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
WGMMA_ARCHITECTURES = ["-gencode=arch=compute_90a,code=sm_90a"]
"""Of files named ``*_wgmma.cu``: Hopper's warpgroup instructions run on no other generation."""


def cuda_home() -> tuple[Path | None, str]:
    """CUDA's folder, or why there is none; nvcc alone may be a wrapper beside which there are no libraries."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    usual = [Path("/usr/local/cuda"), *([Path(on_path).resolve().parents[1]] if on_path else [])]
    reason = ""
    for home in [Path(named)] if named else usual:
        missing = [part for part in ("bin/nvcc", "lib64/libcudart*") if not list(home.glob(part))]
        if not missing:
            return home, ""
        reason = reason or f"there is no {missing[0].strip('*')} in {home}; CUDA_HOME names CUDA's folder"
    return None, reason


def cuda_extension() -> list[Pybind11Extension]:
    """qlab._cuda where QLAB_BUILD_CUDA (auto, 0 or 1) and the machine allow it. No part of it needs torch."""
    wish = os.environ.get("QLAB_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"QLAB_BUILD_CUDA must be auto, 0 or 1, not {wish!r}")
    home, reason = (None, "QLAB_BUILD_CUDA is 0") if wish == "0" else cuda_home()
    if home is None:
        if wish == "1":
            raise SystemExit(f"QLAB_BUILD_CUDA is 1, but qlab._cuda cannot be built: {reason}")
        print(f"qlab._cuda is not built: {reason}")
        return []
    return [
        Pybind11Extension(
            "qlab._cuda",
            ["csrc/cuda.cpp"],
            depends=sorted(str(p) for p in Path("csrc").glob("*") if p.suffix in (".cu", ".cuh") or p.stem.startswith("cuda")),
            cxx_std=17,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            # The static runtime, so that the module fits any torch; it shares the driver's context with torch's own.
            extra_link_args=[f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"],
            optional=wish == "auto",
        )
    ]


class BuildExtensions(build_ext):
    """Compiles the .cu files that belong to qlab._cuda before its C++ is compiled and linked."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name == "qlab._cuda":
            home, reason = cuda_home()
            if home is None:
                raise CompileError(reason)
            objects = Path(self.build_temp)
            objects.mkdir(parents=True, exist_ok=True)
            # A file is compiled anew for itself and for any header, not for another .cu.
            shared = max(Path(p).stat().st_mtime for p in (*ext.depends, __file__) if not p.endswith((".cu", ".cpp")))
            targets = {source: objects / f"{source.stem}.o" for source in sorted(Path("csrc").glob("*.cu"))}
            ext.extra_objects += map(str, targets.values())
            stale = [s for s, t in targets.items() if not t.exists() or t.stat().st_mtime <= max(shared, s.stat().st_mtime)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = dict(zip(stale, pool.map(lambda s: self._compiles(home, s, targets[s]), stale), strict=True))
            if failed := [str(s) for s, ok in compiled.items() if not ok]:
                raise CompileError(f"nvcc could not compile {', '.join(failed)}; QLAB_BUILD_CUDA=0 leaves qlab._cuda out")
        super().build_extension(ext)

    def _compiles(self, home: Path, source: Path, target: Path) -> bool:
        architectures = WGMMA_ARCHITECTURES if source.stem.endswith("_wgmma") else ARCHITECTURES
        command = [str(home / "bin/nvcc"), *NVCC_FLAGS, *architectures, "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        return subprocess.run(command).returncode == 0


setup(
    packages=PACKAGES,
    package_dir={"qlab.triton_kernels": "kernels"},
    package_data={"qlab": ["py.typed", "data/**/*"]},
    exclude_package_data={"qlab": ["data/**/__pycache__/*", "data/__pycache__/*"]},
    ext_modules=[NATIVE, *cuda_extension()],
    cmdclass={"build_ext": BuildExtensions},
)
