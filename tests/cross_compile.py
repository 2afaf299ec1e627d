"""Compile every Triton kernel, in every specialisation that its launcher uses, for each GPU that it is for. Needs no GPU.

    python tests/cross_compile.py [--verbose] [--arch 80 90 100] [--jobs N] [--spill-limit BYTES]

Prints registers, shared memory and spilled bytes per kernel and architecture (per specialisation with ``--verbose``). Exits
with status 1 when one does not compile, spills more than the limit, asks for more shared memory than a block can have, has not
the tensor-core instruction in its machine code that it is meant for, adds by atomics, or gives the tensor cores k in another
order than the kernel files promise.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine_code import TENSOR_CORE, Code, float_atomics, read_cubin, usage_of_cubin

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Largest dynamic shared memory of one block, in bytes (CUDA programming guide)."""
MACHINE_CODE = {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTCHMMA"}
"""What a tensor-core instruction of PTX is in machine code."""


@dataclass(frozen=True)
class Row:
    """What one compilation took; ``fault`` is empty when it is good."""

    kernel: str
    variant: str
    arch: int
    registers: int = 0
    shared: int = 0
    spills: int = 0
    tensor_core: str = ""
    fault: str = ""
    instructions: dict[str, int] = field(default_factory=dict)
    """As :class:`bench.machine_code.Code` counts them; empty where machine code was not read."""


def specs() -> dict[str, object]:
    """Every kernel file's ``SPEC`` by module name."""
    package = importlib.import_module("qlab.triton_kernels")
    modules = (importlib.import_module(f"qlab.triton_kernels.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return {m.__name__.rpartition(".")[2]: m.SPEC for m in modules if hasattr(m, "SPEC")}


def compile_one(module: str, index: int, arch: int, spill_limit: int = 0, machine_code: bool = False) -> Row:
    """Compile variant ``index`` of a kernel file for ``sm_<arch>`` and read what it takes, ``machine_code`` as well.

    To disassemble takes about as long as to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = specs()[module]
    variant = spec.variants[index]
    names = spec.kernel.arg_names
    source = ASTSource(
        spec.kernel,
        {name: variant.signature.get(name, "constexpr") for name in names},
        dict(variant.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    try:
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    except Exception as e:  # whatever the compiler raises is the finding
        return Row(spec.name, variant.label, arch, fault=f"does not compile: {type(e).__name__}: {str(e).splitlines()[-1:]}")
    cubin, tensor_core = built.asm["cubin"], instruction(built.asm["ptx"])
    registers, spills = usage_of_cubin(cubin)
    row = Row(spec.name, variant.label, arch, registers, built.metadata.shared, spills, tensor_core)
    if machine_code:
        row = replace(row, instructions=read_cubin(cubin, f"sm_{arch}").instructions)
    meant_for = variant.tensor_core.get(arch, "mma") if "tl.dot" in spec.kernel.src else ""
    limit, k_width = max(spill_limit, variant.spills), variant.k_width.get(arch, 2)
    return replace(row, fault=fault(row, built.asm["ttgir"], meant_for, limit, k_width))


def compile_all(
    architectures: Sequence[int], jobs: int | None = None, spill_limit: int = 0, machine_code: bool = False
) -> list[Row]:
    """Every specialisation, for those of the architectures that it is for."""
    tasks = [
        (name, i, arch)
        for name, spec in specs().items()
        for arch in architectures
        for i, variant in enumerate(spec.variants)
        if arch in variant.architectures
    ]
    # Fresh processes, for a forked one would share the compiler's state.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, *task, spill_limit, machine_code) for task in tasks]
        return [f.result() for f in futures]


def fault(row: Row, ttgir: str, meant_for: str, spill_limit: int, k_width: int = 2) -> str:
    """Why a compiled kernel is not good enough, or nothing; ``meant_for``: its tensor-core instruction, if any."""
    code = Code(row.kernel, f"sm_{row.arch}", row.registers, row.spills, row.shared, row.instructions)
    if row.spills > spill_limit:
        return f"spills {row.spills} bytes, more than {spill_limit}"
    if row.shared > SHARED_LIMIT[row.arch]:
        return f"needs {row.shared} bytes of shared memory, more than {SHARED_LIMIT[row.arch]}"
    if {i.split(" ")[0] for i in row.tensor_core.split(", ")} != {meant_for}:
        return f"is meant for {meant_for or 'no tensor core'}, and its PTX has {row.tensor_core or 'none'}"
    found = [i for i in TENSOR_CORE if code.count(i)]
    if row.instructions and found != ([MACHINE_CODE[meant_for]] if meant_for else []):
        return f"is meant for {meant_for or 'no tensor core'}, and its machine code has {' and '.join(found) or 'none'}"
    if atomics := float_atomics(code):
        return f"adds in the order of arrival: {', '.join(atomics)}"
    # With another kWidth a thread holds other neighbouring k, and one mma takes other 16 than the recipe says.
    widths = set(re.findall(r"kWidth = (\d+)", ttgir)) - {str(k_width)}
    return f"kWidth {', '.join(sorted(widths))}: k is not in order" if widths else ""


def instruction(ptx: str) -> str:
    """The tensor-core instructions of a kernel, by shape."""
    found = set(re.findall(r"(wgmma|mma)\.(?:mma_async\.)?sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    found |= set(re.findall(r"(tcgen05)\.(mma)\.", ptx))
    return ", ".join(sorted(f"{kind} {shape}" for kind, shape in found))


def summary(rows: list[Row]) -> Iterator[str]:
    """One line per kernel and architecture: the most that any of its specialisations takes."""
    for kernel, arch in dict.fromkeys((r.kernel, r.arch) for r in rows):
        some = [r for r in rows if (r.kernel, r.arch) == (kernel, arch)]
        cores = sorted({r.tensor_core for r in some if r.tensor_core})
        yield (
            f"{kernel:16} sm_{arch} {len(some):4} variants: at most {max(r.registers for r in some):3} registers, "
            f"{max(r.shared for r in some):6} B shared, {max(r.spills for r in some)} B spilled; {' or '.join(cores) or '-'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="one line per specialisation")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--spill-limit", type=int, default=0, help="bytes per thread")
    options = parser.parse_args()
    rows = compile_all(options.arch, options.jobs, options.spill_limit)
    if options.verbose:
        for r in rows:
            taken = f"{r.registers:3} registers, {r.shared:6} B shared, {r.spills} B spilled; {r.tensor_core or '-'}"
            print(f"{r.kernel:16} sm_{r.arch} {r.variant:44} {taken}")
    print(*summary(rows), sep="\n")
    bad = [r for r in rows if r.fault]
    for r in bad:
        print(f"FAILED {r.kernel} sm_{r.arch} [{r.variant}]: {r.fault}")
    print(f"{len(rows)} specialisations compiled, {len(bad)} failed")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # the interpreter has nothing to compile
    with tempfile.TemporaryDirectory() as cache:  # an earlier run's cache would hide what no longer compiles
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
