"""What compiled GPU code is made of: registers, local and shared memory, instructions. Read by Triton's cuobjdump."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from qlab.errors import QlabError

TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
"""Tensor-core instructions on 16-bit numbers: a warp's, a warpgroup's (sm_90a), a thread's (sm_100a)."""
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS", "UREDGR")
WHOLE = (*TENSOR_CORE, *ATOMICS)
"""Instructions that are counted by shape and type; others by their name alone."""
KINDS = frozenset(
    (
        *WHOLE,
        *("LDS", "LDSM", "STS", "STSM", "LDGSTS", "UBLKCP", "UTMALDG", "LDG", "STG", "LDL", "STL", "LDTM", "STTM"),
        *("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "I2F", "I2FP", "F2F", "F2FP"),
        *("LOP3", "SHF", "PRMT", "SHFL", "MOVM", "BAR", "SYNCS", "WARPSYNC", "WARPGROUP", "MEMBAR"),
    )
)
"""What is counted beside ``total``."""

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_SECTION = re.compile(r"arch = (\w+)")
_FUNCTION = re.compile(r"\s*Function\s*:? ?([\w.$]+):?")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Code:
    """One kernel, compiled for one architecture."""

    kernel: str
    """Its name, with what specialises it."""
    arch: str
    registers: int
    """Of a thread."""
    local: int
    """Bytes of local memory of a thread: spilled registers, and arrays without a fixed index."""
    shared: int
    """Bytes of shared memory of a block; of a C++ kernel without what its launch adds."""
    instructions: dict[str, int] = field(default_factory=dict)
    """How often each of KINDS stands in the code, and how many instructions there are in all."""

    def count(self, *names: str) -> int:
        """Instructions of these names, whatever their shape and type."""
        return sum(n for i, n in self.instructions.items() if i.split(".")[0] in names)


def read(file: Path, *options: str) -> tuple[Code, ...]:
    """Every kernel in a cubin, an object or a shared library, by name and architecture."""
    usage = dict(usages(cuobjdump("--dump-resource-usage", *options, str(file)).splitlines()))
    found = dict(mixes(cuobjdump("--dump-sass", *options, str(file)).splitlines()))
    if set(usage) != set(found):
        raise QlabError(f"cuobjdump lists other kernels of {file.name} than it disassembles")
    names = dict(zip(usage, demangled([name for _, name in usage]), strict=True))
    codes = (Code(names[key], key[0], *usage[key], found[key]) for key in usage)
    return tuple(sorted(codes, key=lambda c: (c.kernel, c.arch)))


def read_cubin(cubin: bytes, arch: str) -> Code:
    """The one kernel in a cubin."""
    with _file(cubin) as path:
        (code,) = read(path)
    return replace(code, arch=arch)


def usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of the one kernel in a cubin: without its instructions, which take long to read."""
    with _file(cubin) as path:
        ((_, (registers, local, _)),) = usages(cuobjdump("--dump-resource-usage", str(path)).splitlines())
    return registers, local


@contextmanager
def _file(cubin: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield Path(file.name)


def usages(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], tuple[int, int, int]]]:
    """((architecture, name), (registers, local, shared)) from what ``cuobjdump --dump-resource-usage`` writes."""
    arch = name = ""
    for line in lines:
        if section := _SECTION.match(line):
            arch = section[1]
        elif function := _FUNCTION.match(line):
            name = function[1]
        elif taken := _USAGE.search(line):
            registers, stack, shared, local = map(int, taken.groups())
            yield (arch, name), (registers, stack + local, shared)


def mixes(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    """((architecture, name), instructions) from what ``cuobjdump --dump-sass`` writes."""
    arch = name = ""
    counts: Counter[str] = Counter()
    for line in lines:
        if instruction := _INSTRUCTION.match(line):
            counts["total"] += 1
            if kind := counted(instruction[1]):
                counts[kind] += 1
            continue
        section, function = _SECTION.match(line), _FUNCTION.match(line)
        if (section or function) and counts:
            yield (arch, name), dict(sorted(counts.items()))
            counts = Counter()
        if section:
            arch = section[1]
        elif function:
            name = function[1]
    if counts:
        yield (arch, name), dict(sorted(counts.items()))


def counted(operation: str) -> str:
    """Under which name an instruction is counted; empty where it is not."""
    kind = operation.split(".")[0]
    return "" if kind not in KINDS else operation if kind in WHOLE else kind


def float_atomics(code: Code) -> list[str]:
    """Atomics that add floating-point numbers: sums in the order in which threads arrive."""
    return [i for i in code.instructions if i.split(".")[0] in ATOMICS and re.search(r"\.(?:F16|F32|F64|BF16)", i)]


def demangled(names: list[str]) -> list[str]:
    """C++ names as they are written, without namespaces, return type and parameters."""
    if not any(name.startswith("_Z") for name in names):
        return names
    try:
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except OSError:
        raise QlabError("c++filt is missing; it comes with the compiler that nvcc needs (binutils)") from None
    return [re.sub(r"\w+::|^void |\(.*\)$", "", line.replace("(anonymous namespace)::", "")) for line in text.splitlines()]


def cuobjdump(*arguments: str) -> str:
    """What it writes. Raises QlabError where it is missing or fails."""
    run = subprocess.run([tools() / "cuobjdump", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise QlabError(f"cuobjdump {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout


@lru_cache(maxsize=1)
def tools() -> Path:
    """The folder of the CUDA tools that Triton ships. Raises QlabError where there is none."""
    try:
        import triton
    except ImportError as e:
        raise QlabError(f"Triton, which ships cuobjdump, cannot be imported: {e}") from None
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (folder / "cuobjdump").exists():
        raise QlabError(f"there is no cuobjdump in {folder}")
    return folder


def version(tool: Path | str) -> str:
    """The release of one of NVIDIA's tools: 13.0.88."""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\bV(\d+\.\d+\.\d+)", text)[0]
