"""What nvcc makes of csrc/*.cu, without a GPU: tensor cores where they are meant, no spills, nothing added by atomics."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")  # ships cuobjdump
from bench.compiled import FOLDER, LOCAL, Record, compiler, cuda, faults
from bench.machine_code import Code, counted, demangled, mixes, usages
from qlab.errors import QlabError

CSRC = Path(__file__).resolve().parents[2] / "csrc"
RECORDED = sorted(FOLDER.glob("*.json"))
GLOBAL = re.compile(r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")


@pytest.fixture(scope="module")
def compiled() -> tuple[Record, list[str]]:
    """Of qlab._cuda where it was built after its sources, as by pip in the same run, otherwise compiled here."""
    try:
        compiler()
    except QlabError as e:
        pytest.skip(f"csrc/*.cu is not compiled: {e}")
    return cuda()


def test_every_kernel_is_what_it_is_meant_to_be(compiled: tuple[Record, list[str]]) -> None:
    assert not compiled[1], "\n".join(compiled[1])


def test_every_kernel_is_compiled_for_every_generation(compiled: tuple[Record, list[str]]) -> None:
    """Those of ``*_wgmma`` for sm_90a alone."""
    written: dict[str, set[str]] = {}
    for file in CSRC.glob("*.cu*"):
        for name in GLOBAL.findall(file.read_text()):
            written[name] = {"sm_90a"} if file.stem.endswith("_wgmma") else {"sm_80", "sm_90"}
    found: dict[str, set[str]] = {name: set() for name in written}
    for code in compiled[0].kernels:
        found[code.kernel.split("<")[0]].add(code.arch)
    assert found == written
    assert sum(f.read_text().count("__global__") for f in CSRC.glob("*.cu*")) == len(written)


def test_the_record_is_what_these_versions_compile(compiled: tuple[Record, list[str]]) -> None:
    made = compiled[0]
    path = next((p for p in RECORDED if Record.load(p).versions == made.versions), None)
    if path is None:
        pytest.skip(f"nothing is recorded of {made.versions}")
    before, now = ({f"{c.kernel} for {c.arch}": c for c in r.kernels} for r in (Record.load(path), made))
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    again = f"python -m bench.compiled cuda --out {path.relative_to(FOLDER.parents[1])}"
    assert not other, f"run `{again}` again; it holds other code of {len(other)} kernels: {'; '.join(other[:3])}"


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_nothing_is_wrong_with_what_is_recorded(path: Path) -> None:
    kernels = Record.load(path).kernels
    assert kernels
    assert all(k.registers <= 255 and k.instructions["total"] for k in kernels)
    if path.stem.startswith("nvcc"):
        assert not [f for k in kernels for f in faults(k)]
    else:
        wgmma = [k for k in kernels if k.kernel.startswith("w4a16, ") and k.arch == "sm_90"]
        assert wgmma
        assert all(k.count("HGMMA") and not k.count("HMMA") for k in wgmma)
        assert {k.arch for k in kernels if k.kernel.startswith("w4a16, ")} == {"sm_80", "sm_90", "sm_100"}


# -- faults are seen ---------------------------------------------------------------------------------------------------------

WGMMA = Code(
    "int4_wgmma<WgmmaShape<64, 256, 1, false>, Bf16, false>",
    "sm_90a",
    168,
    0,
    1136,
    {"HGMMA.64x64x16.F32.BF16": 16, "UBLKCP": 2, "UTMALDG": 2, "ATOMG.E.ADD.STRONG.GPU": 2, "total": 1900},
)
MMA = Code("int4_mma<MmaShape<8, 2, false, 1>, Fp16>", "sm_90", 128, 0, 1056, {"HMMA.16816.F32": 64, "LDSM": 32, "total": 2500})
INVARIANT = Code("gemm<Tile<8, 64>, true>", "sm_80", 204, 0, 0, {"FFMA": 512, "total": 1500})
PLANNED = Code("planned_tiles<Shape<1, 4, 1, 4, 6, 4>, 8, false, true>", "sm_80", 108, 0, 0, {"HMMA.1688.F16": 8})


def having(code: Code, **instructions: int) -> Code:
    """With these instructions, ``_`` for a dot, beside or in the place of its own; 0 takes one away."""
    mix = code.instructions | {k.replace("_", "."): n for k, n in instructions.items()}
    return replace(code, instructions={k: n for k, n in mix.items() if n})


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (WGMMA, ""),
        (MMA, ""),
        (INVARIANT, ""),
        (PLANNED, ""),
        (having(WGMMA, HGMMA_64x64x16_F32_BF16=0), "is meant for HGMMA.64x64x16.F32.BF16, and has none"),
        (having(WGMMA, HMMA_16816_F32_BF16=4), "and has HGMMA.64x64x16.F32.BF16 and HMMA.16816.F32.BF16"),
        (replace(WGMMA, kernel=WGMMA.kernel.replace("64, ", "128, ")), "is meant for HGMMA.64x128x16.F32.BF16, and has"),
        (replace(WGMMA, local=16), "16 bytes of local memory, more than 0"),
        (having(WGMMA, LDL=3, STL=2), "5 local loads and stores"),
        (having(WGMMA, UTMALDG=0), "does not load by the copy engine"),
        (having(WGMMA, RED_E_ADD_F32_FTZ_RN_STRONG_GPU=1), "adds in the order of arrival: RED.E.ADD.F32.FTZ.RN.STRONG.GPU"),
        (having(MMA, HGMMA_64x8x16_F32=1), "is meant for HMMA.16816.F32, and has HMMA.16816.F32 and HGMMA.64x8x16.F32"),
        (replace(MMA, local=200), "200 bytes of local memory, more than"),
        (having(INVARIANT, HMMA_16816_F32=1), "is meant for no tensor core, and has HMMA.16816.F32"),
        (having(INVARIANT, FFMA=0), "no fused multiply-adds"),
        (having(PLANNED, HMMA_1688_F16=0, HMMA_16816_F16=8), "is meant for HMMA.1688.F16, and has HMMA.16816.F16"),
    ],
)
def test_a_fault_is_seen(code: Code, sentence: str) -> None:
    found = faults(code)
    assert len(found) == bool(sentence), found
    assert sentence in "".join(found)


def test_a_kernel_that_nobody_describes_is_refused() -> None:
    with pytest.raises(QlabError, match="does not say what int4_new<Shape, Fp16> is made of"):
        faults(replace(MMA, kernel="int4_new<Shape, Fp16>"))


def test_exceptions_are_of_kernels_that_exist() -> None:
    for name in (p for p in RECORDED if p.stem.startswith("nvcc")):
        kernels = Record.load(name).kernels
        for begin in LOCAL:
            assert [k for k in kernels if k.kernel.startswith(begin)], f"no kernel is called {begin}"


USAGE = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4qlab4int410int4_wgmmaINS0_10WgmmaShapeILi64ELi64ELi4ELb0EEENS0_4Fp16EEEvNS0_9ArgumentsE14CUtensorMap_st:
  REG:168 STACK:8 SHARED:1168 LOCAL:4 CONSTANT[0]:768 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_80
\tcode for sm_80
\t\tFunction : first
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
                                                                              /* 0x000fe40000000f00 */
        /*0010*/              @!P0 STL [R1], R2 ;                             /* 0x0000000000067919 */
        /*0020*/              @UP1 UBLKCP.S.G [UR8], [UR10], UR4, desc[UR6] ; /* 0x0000000000067919 */
\t\tFunction : second
        /*0000*/                   HGMMA.64x16x16.F32 R24, R8, gdesc[UR4], R24, !UPT ;
arch = sm_90
\t\tFunction : second
        /*1fff0*/                  ATOMG.E.ADD.STRONG.GPU PT, R6, desc[UR8][R4.64], R7 ;
"""


def test_what_cuobjdump_writes_is_read() -> None:
    (((arch, name), taken),) = usages(USAGE.splitlines())
    assert (arch, taken) == ("sm_90a", (168, 12, 1168))
    assert demangled([name]) == ["int4_wgmma<WgmmaShape<64, 64, 4, false>, Fp16>"]
    assert dict(mixes(SASS.splitlines())) == {
        ("sm_80", "first"): {"STL": 1, "UBLKCP": 1, "total": 3},
        ("sm_80", "second"): {"HGMMA.64x16x16.F32": 1, "total": 1},
        ("sm_90", "second"): {"ATOMG.E.ADD.STRONG.GPU": 1, "total": 1},
    }
    assert [counted(i) for i in ("LDS.128", "IADD3.X", "UTCHMMA")] == ["LDS", "", "UTCHMMA"]
