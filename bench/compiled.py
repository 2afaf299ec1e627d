"""What the compilers make of every kernel: ``python -m bench.compiled {cuda,triton} --out FILE``. Needs no GPU.

Registers, local memory, static shared memory and instructions of each specialisation, as JSON: of csrc/*.cu for sm_80, sm_90
and sm_90a from qlab._cuda, which is compiled anew where it is older than its sources, and of kernels/*.py for sm_80, sm_90 and
sm_100. Exits with status 1 where a kernel is not what it is meant to be: another tensor-core instruction than its own, local
memory that is not in :data:`LOCAL`, sums by atomics. The same versions of the compilers write the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.machine_code import TENSOR_CORE, Code, float_atomics, read, tools, version
from qlab.errors import QlabError
from qlab.serial import read_json, to_plain, write_whole

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "compiled"
SCHEMA = "qlab.compiled/1"
SOURCES = ("*.cu", "*.cuh", "*.hpp")
LOCAL = {
    "fast_chains": (256, "the sums of its slow form, in an array that is indexed at run time"),
    "gemm<Tile<1, 32>": (64, "spilled"),
    "gemm<Tile<2, 16>": (16, "spilled"),
    "gemm<Tile<8, 32>": (48, "spilled"),
    "gemm<Tile<16, 32>": (112, "spilled"),
    "gemm<Tile<16, 64>": (184, "spilled"),
    "int4_mma": (8, "spilled"),
    "int4_wgmma<WgmmaShape<64, 256, 2, false>, Bf16, false>": (16, "spilled"),
}
"""Bytes of local memory that C++ kernels may take, by the beginning of their names, and what for; the others take none."""


@dataclass(frozen=True)
class Record:
    """Every kernel of one kind, compiled."""

    schema: str
    versions: dict[str, str]
    """Of the compilers and of what reads their code."""
    kernels: tuple[Code, ...]

    def write(self, path: Path) -> None:
        """One line for each kernel."""
        head = json.dumps({"schema": self.schema, "versions": self.versions}, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(to_plain(k))}" for k in self.kernels)
        write_whole(path, f'{head},\n "kernels": [\n{lines}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, path: Path) -> Record:
        return read_json(cls, path, SCHEMA)


def cuda() -> tuple[Record, list[str]]:
    """csrc/*.cu, and what is wrong with it. Raises QlabError where it does not compile."""
    nvcc = compiler()
    versions = {"nvcc": version(nvcc), "ptxas": version(nvcc.parent / "ptxas"), "cuobjdump": version(tools() / "cuobjdump")}
    codes = read(library())
    return Record(SCHEMA, versions, codes), [f"{c.kernel} for {c.arch}: {f}" for c in codes for f in faults(c)]


def triton() -> tuple[Record, list[str]]:
    """kernels/*.py, and what is wrong with it."""
    import triton

    from tests.cross_compile import SHARED_LIMIT, compile_all

    names = ("ptxas", "ptxas-blackwell", "cuobjdump")
    versions = {"triton": triton.__version__} | {name: version(tools() / name) for name in names}
    rows = compile_all(sorted(SHARED_LIMIT), machine_code=True)
    codes = [Code(f"{r.kernel}, {r.variant}", f"sm_{r.arch}", r.registers, r.spills, r.shared, r.instructions) for r in rows]
    found = [f"{r.kernel}, {r.variant} for sm_{r.arch}: {r.fault}" for r in rows if r.fault]
    return Record(SCHEMA, versions, tuple(codes)), found


def faults(code: Code) -> list[str]:
    """In what a C++ kernel's code is not what its name says."""
    found = []
    wanted, there = instructions(code.kernel), [i for i in code.instructions if i.split(".")[0] in TENSOR_CORE]
    if there != wanted:
        found.append(f"is meant for {' and '.join(wanted) or 'no tensor core'}, and has {' and '.join(there) or 'none'}")
    most = max((most for begin, (most, _) in LOCAL.items() if code.kernel.startswith(begin)), default=0)
    if code.local > most:
        found.append(f"{code.local} bytes of local memory, more than {most}")
    if not most and (count := code.count("LDL", "STL")):
        found.append(f"{count} local loads and stores")
    if code.kernel.startswith("gemm") and not code.count("FFMA"):
        found.append("no fused multiply-adds")
    if code.arch == "sm_90a" and not (code.count("UTMALDG") and code.count("UBLKCP")):
        found.append("does not load by the copy engine")
    if atomics := float_atomics(code):
        found.append(f"adds in the order of arrival: {', '.join(atomics)}")
    return found


def instructions(kernel: str) -> list[str]:
    """The tensor-core instructions that a C++ kernel is meant for, by its name and parameters. Raises QlabError for others."""
    name, *given = re.findall(r"\w+", kernel)
    half = "false"
    match name, given:
        case "int4_wgmma", [_, rows, *_, dtype, _]:
            return [f"HGMMA.64x{rows}x16.F32{'.BF16' if dtype == 'Bf16' else ''}"]
        case "int4_mma", [*_, dtype]:
            k, bf16 = "16", "true" if dtype == "Bf16" else "false"
        case "planned_tiles", [*_, k, bf16, half]:
            pass
        case "mma_tiles", [k, bf16]:
            pass
        case "mma_half_tiles", [k]:
            bf16, half = "false", "true"
        case (("gemm" | "dot_tiles" | "fast_chains" | "plain_chains" | "join_chains" | "replayed_tiles"), _):
            return []
        case _:
            raise QlabError(f"bench/compiled.py does not say what {kernel} is made of")
    return [f"HMMA.168{k}.F{16 if half == 'true' else 32}{'.BF16' if bf16 == 'true' else ''}"]


def library() -> Path:
    """qlab._cuda as its sources are now: the built one or, where that is missing or older, one that is compiled for this."""
    newest = max(p.stat().st_mtime for p in (ROOT / "setup.py", *(p for s in SOURCES for p in (ROOT / "csrc").glob(s))))
    built = find_spec("qlab._cuda")
    if built and built.origin and Path(built.origin).stat().st_mtime > newest:
        return Path(built.origin)
    folder = ROOT / "build" / "compiled"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder), "--build-lib", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "QLAB_BUILD_CUDA": "1"}, capture_output=True, text=True)
    if run.returncode:
        raise QlabError(f"csrc/*.cu does not compile:\n{run.stdout}{run.stderr}")
    return next((folder / "qlab").glob("_cuda*"))


def compiler() -> Path:
    """nvcc, as setup.py finds it. Raises QlabError with setup.py's reason where it finds none, or one without libraries."""
    environment = {**os.environ, "QLAB_BUILD_CUDA": "auto"}
    asked = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True)
    if reason := re.search(r"qlab\._cuda is not built: (.*)", asked.stdout):
        raise QlabError(reason[1])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return Path(home, "bin/nvcc") if home else usual if usual.exists() else Path(shutil.which("nvcc") or "nvcc").resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cuda", "triton"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # the interpreter has nothing to compile
    with tempfile.TemporaryDirectory() as cache:  # an earlier run's cache would hide what no longer compiles
        os.environ["TRITON_CACHE_DIR"] = cache
        record, found = {"cuda": cuda, "triton": triton}[options.kind]()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record.write(options.out)
    print(f"{len(record.kernels)} kernels compiled by {', '.join(f'{k} {v}' for k, v in record.versions.items())}")
    for fault in found:
        print(f"FAILED {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
