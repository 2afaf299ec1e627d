"""The Triton GEMM of its own storage: the interpreter, its decoding PTX by hand, its machine code, and on a GPU its recipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qlab.backends.reference import oracle
from qlab.backends.registry import Problem, kernel
from qlab.hardware import detect, gpu
from qlab.inputs import random_activations, random_weight
from qlab.packing import wgmma_rows
from qlab.recipes import DEFAULT, assemble, scheme_of, tuned
from qlab.recipes.rules import Ranges
from qlab.recipes.tuned import Choice
from qlab.replay import replay
from qlab.weights import Int4Weight, round_once, sequential_groups
from tests.ladder import Case, exact_probe, integers

ROOT = Path(__file__).resolve().parents[2]
NAME = "triton.w4a16"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def tile(block_m: int, block_n: int, warps: int = 4, stages: int = 3) -> tuple[tuple[str, int], ...]:
    return (("block_m", block_m), ("block_n", block_n), ("warps", warps), ("stages", stages))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes the tiles of a GPU: many programs a launch, with masks and offsets that large tiles hide."""
    from qlab.backends.triton_w4a16 import launchers

    if launchers().interpreted:  # which chose the interpreter, before the kernel is imported
        from qlab.triton_kernels import w4a16_launch

        monkeypatch.setattr(w4a16_launch, "_interpreted", lambda m, n: w4a16_launch.Config(16, 64, 4, 1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case(17, 640, 136, 32), (1, 3)),
        (Case(3, 384, 72, 64), (2, 9)),
        (Case(18, 640, 72, 128), (5,)),
        (Case(3, 1000, 24, 1000), (1, 4)),
        (Case(1, 384, 72, 384), (3,)),
        (Case(5, 768, 24, 256), (2,)),
        (Case(5, 576, 24, 96), (3,)),
        (Case(5, 384, 72, 64, act_order=True), (2,)),
    ],
    ids=str,
)
def test_slices(case: Case, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """However K is cut, exact sums are float64's; again at the end, where a counter that was not left zero shows."""
    k = kernel(NAME)
    for symmetric in (False, True):
        weight = exact_probe(k, case, dtype, DEVICE)
        if symmetric:
            weight = replace(weight, zeros=torch.full_like(weight.zeros, 8))
        packed = k.pack(weight)
        x = integers(case.m, case.k, dtype=dtype, seed=1).to(DEVICE)
        for slices in (*counts, counts[0]):
            y = k.run_as(x, packed, Choice(slices))  # type: ignore[attr-defined]
            assert torch.equal(y, round_once(oracle(x, weight), dtype))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_joined_from_the_first_up(dtype: torch.dtype) -> None:
    """Beside 12288, terms of 0.41 fp32 ULP vanish one by one, and two of them together are an ULP."""
    k, small, ulp = kernel(NAME), 13 * 2.0**-15, 2.0**-10
    ones = torch.ones(1024, 8)
    weight = Int4Weight((9 * ones).byte(), (8 * ones[:8]).byte(), ones[:8].to(dtype), sequential_groups(1024, 128)).to(DEVICE)
    x = torch.zeros(2, 1024, dtype=dtype)
    x[0, [0, 256, 384, 512]] = torch.tensor([12288, small, small, -12288], dtype=dtype)
    x[1, [0, 256, 512, 768]] = torch.tensor([small, small, 12288, -12288], dtype=dtype)
    results = {s: k.run_as(x.to(DEVICE), k.pack(weight), Choice(s)).cpu().float() for s in (1, 4)}  # type: ignore[attr-defined]
    assert results[1][0].unique().tolist() == [0.0], "in one chain each small term vanishes beside 12288"
    assert results[4][0].unique().tolist() == [ulp], "slice 1 adds its two terms before it is joined"
    assert results[4][1].unique().tolist() == [ulp], "joined from slice 0 up: from slice 3 down it would be 0.81 ULP"


def test_slices_are_those_of_the_recipe() -> None:
    """The launcher's blocks for each slice and the table's ranges are one rule."""
    for k in (128, 200, 640, 4096, 11008):
        for count in range(1, 20):
            blocks = -(-k // 128)
            span = -(-blocks // count)
            cut = [(128 * s * span, min(k, 128 * (s + 1) * span)) for s in range(-(-blocks // span))]
            assert tuple(cut) == tuned.ranges(k, count)


def test_recipe() -> None:
    problem = Problem(64, 4096, 256, 128, torch.float16, False, True)
    for key, width in (("h100", 2), ("a100", 4)):
        scheme = scheme_of(NAME, problem, gpu(key))
        assert (scheme.k_width, scheme.rows, scheme.order, scheme.weights) == (width, "sorted", "ascending", "rounded")
    later = replace(DEFAULT, triton="3.8.0")
    assert scheme_of(NAME, problem, gpu("a100"), later).k_width == 2
    assert scheme_of(NAME, replace(problem, symmetric=True), gpu("a100"), later).k_width == 4
    with pytest.raises(Exception, match=r"compute capability 10\.0"):
        scheme_of(NAME, problem, gpu("b200"))


def test_the_recipe_takes_k_as_the_code_is_compiled() -> None:
    """By the installed Triton: what tests/cross_compile.py holds each specialisation to."""
    import triton
    from qlab.triton_kernels import w4a16

    build = replace(DEFAULT, triton=triton.__version__)
    for v in w4a16.SPEC.variants:
        symmetric = bool(v.constants["SYMMETRIC"])
        problem = Problem(16, 4096, 256, 128, torch.float16, symmetric, False)
        for key, arch in (("a100", 80), ("h100", 90)):
            assert scheme_of(NAME, problem, gpu(key), build).k_width == v.k_width.get(arch, 2), f"{v.label} on {key}"


# -- the inline PTX, executed in Python --------------------------------------------------------------------------------------


def execute(text: str, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The registers after the PTX of decoding; each an int64 tensor of 32-bit values, one for each instance."""
    registers = dict(inputs)

    def value(name: str) -> Tensor:
        if name in registers:
            return registers[name]
        return torch.full_like(next(iter(inputs.values())), int(name, 0) & 0xFFFFFFFF)

    def halves(bits: Tensor) -> Tensor:
        return torch.stack((bits & 0xFFFF, bits >> 16)).to(torch.int32).to(torch.int16).view(dtype).double()

    def joined(parts: Tensor) -> Tensor:
        low, high = (round_once(parts, dtype).view(torch.int16).to(torch.int64) & 0xFFFF).unbind()
        return low | (high << 16)

    for line in re.findall(r"[^;{}]+", text):
        operation, _, rest = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        into, *names = (n.strip() for n in rest.split(","))
        a = [value(n) for n in names]
        kind = operation.split(".")[0]
        if kind == "mov":
            found = a[0]
        elif kind == "shr":
            found = a[0] >> a[1]
        elif kind == "lop3":
            assert names[3] == "0xea"
            found = (a[0] & a[1]) | a[2]
        elif kind == "prmt":
            both, picks = a[0] | (a[1] << 32), [int(names[2], 0) >> 4 * i & 15 for i in range(4)]
            found = sum(((both >> (8 * p)) & 0xFF) << (8 * i) for i, p in enumerate(picks))
        else:
            assert operation.endswith(".rn.f16x2" if dtype == torch.float16 else ".rn.bf16x2"), operation
            x, y = halves(a[0]), halves(a[1])
            found = joined(x + y if kind == "add" else x * y if kind == "mul" else x * y + halves(a[2]))
        registers[into] = found & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_in_ptx(dtype: torch.dtype, symmetric: bool) -> None:
    """Every code in every nibble with every zero point and many scales is RN((q - z) * s), where the joins expect it."""
    from qlab.triton_kernels import w4a16

    texts = {
        (torch.float16, True): w4a16._FP16_EIGHT,
        (torch.float16, False): w4a16._FP16_ZEROS,
        (torch.bfloat16, True): w4a16._BF16_EIGHT,
        (torch.bfloat16, False): w4a16._BF16_ZEROS,
    }
    g = torch.Generator().manual_seed(3)
    count = 17 * 512
    words = torch.randint(0, 1 << 32, (2, count), generator=g)
    zeros = (
        torch.full((2, count), 8) if symmetric else (torch.arange(2 * count).reshape(2, count) + torch.tensor([[0], [5]])) % 17
    )
    scales = torch.randint(1, 0x7BFF if dtype == torch.float16 else 0x7F00, (2, count), generator=g)
    scales |= torch.randint(0, 2, (2, count), generator=g) << 15
    high = torch.randint(0, 1 << 16, (2, count), generator=g) if symmetric else zeros | wgmma_rows.MINUS_MAGIC[dtype]
    packed = scales | (high << 16)
    inputs = {"$8": words[0], "$9": words[1], "$10": packed[0], "$11": packed[0], "$12": packed[1], "$13": packed[1]}
    registers = execute(texts[dtype, symmetric].value, inputs, dtype)
    s = scales.to(torch.int32).to(torch.int16).view(dtype).double()
    for j in range(8):
        a, nibble = divmod(j, 4)
        for i0 in (0, 1):
            q = words[a] >> 4 * (nibble + 4 * i0) & 15
            got = (registers[f"${j}"] >> 16 * i0 & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
            want = round_once((q - zeros[a]).double() * s[a], dtype)
            assert torch.equal(got.double(), want.double()), f"register {j}, half {i0}"


# -- machine code ------------------------------------------------------------------------------------------------------------

COMPILE = """
import json, sys
from tests.triton.machine_code import facts
print(json.dumps([facts(**options) for options in json.loads(sys.argv[1])]))
"""
CODE = [
    {"block_m": 16, "block_n": 64, "warps": 4, "stages": 4},
    {"block_m": 16, "block_n": 128, "warps": 4, "stages": 4, "dtype": "bf16"},
    {"block_m": 16, "block_n": 128, "warps": 4, "stages": 4, "symmetric": True},
    {"block_m": 16, "block_n": 64, "warps": 4, "stages": 4, "symmetric": True, "r": 2},
    {"block_m": 16, "block_n": 128, "warps": 4, "stages": 4, "r": 4},
    {"block_m": 64, "block_n": 128, "warps": 8, "stages": 4, "slices": 2},
    {"block_m": 64, "block_n": 128, "warps": 8, "stages": 3, "slices": 1},
    {"block_m": 128, "block_n": 128, "warps": 8, "stages": 3, "slices": 1, "symmetric": True, "dtype": "bf16"},
    {"block_m": 256, "block_n": 128, "warps": 8, "stages": 3, "slices": 1},
    {"block_m": 256, "block_n": 128, "warps": 8, "stages": 3, "r": 4},
]


def compiled(options: list[dict], cache: Path) -> list[dict]:
    """Facts about compiled kernels, from a process of its own, for this one may have chosen the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, json.dumps(options)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return compiled(CODE, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("index", range(len(CODE)), ids=lambda i: "-".join(map(str, CODE[i].values())))
def test_machine_code(code: list[dict], index: int, record_property) -> None:
    """wgmma with the weight from registers, in the loop nothing exchanged between threads and nothing spilled."""
    from qlab.triton_kernels.w4a16 import SPILLS

    found, asked = code[index], CODE[index]
    for name, value in found.items():
        record_property(name, value)
    loop = found["loop"]
    columns = asked["block_m"]
    instructions = {i for i in loop if i.startswith("HGMMA")}
    suffix = ".BF16" if asked.get("dtype") == "bf16" else ""
    assert instructions == {f"HGMMA.64x{columns}x16.F32{suffix}"}
    assert sum(loop[i] for i in instructions) == 8 * asked["block_n"] // 64 * 4 // asked["warps"]
    assert not [i for i in loop if i.startswith(("STS", "SHFL", "LDG.", "LDL", "STL", "I2F", "HMMA", "BAR.ARV"))], loop
    rows = asked["block_n"] // 8 // asked["warps"]  # of a thread
    assert loop.get("PRMT", 0) <= 2 * rows * asked.get("r", 1)  # takes scales and zero points apart, never codes
    assert loop["LDGSTS.E.BYPASS.128"] >= 3
    assert found["overwritten"] == []
    assert found["spills"] <= SPILLS.get((asked["block_m"], asked.get("slices", 4) > 1), 0)
    assert found["k_widths"] == ["2"]
    assert found["registers"] <= 255
    assert found["shared"] <= 232448


def test_no_tile_that_is_tuned_overwrites_what_wgmma_reads(tmp_path: Path) -> None:
    """Of every tile that bench.tune tries: a weight in registers stays until the tensor core has read it."""
    from bench.tune_candidates import TRITON

    names = ("block_m", "block_n", "warps", "stages")
    tiles = [dict(zip(names, t, strict=True), slices=1) for t in dict.fromkeys(t for some in TRITON.values() for t in some)]
    for asked, found in zip(tiles, compiled(tiles, tmp_path), strict=True):
        assert any(i.startswith("HGMMA") for i in found["loop"]), asked
        assert found["overwritten"] == [], asked


def test_what_overwrites_is_found() -> None:
    """Planted: a write before the wait, one behind the back edge, a wait that leaves the group pending, no wait at all."""
    from tests.triton.machine_code import overwritten

    wgmma, late = ("HGMMA.64x64x16.F32", " R24, R80, gdesc[UR8], R24, gsb0"), ("WARPGROUP.DEPBAR.LE", " gsb0, 0x1")
    wait, write = ("WARPGROUP.DEPBAR.LE", " gsb0, 0x0"), ("LDS.128", " R80, [R56+0xc000]")
    assert overwritten([write, wgmma, wait]) == overwritten([wgmma, wait, write]) == []
    assert overwritten([("LDS.64", " R78, [R56]"), wgmma, ("STS.128", " [R3], R80"), wait]) == []
    for loop in (
        [wgmma, write, wait],
        [write, wait, wgmma],
        [write, wgmma, late],
        [wgmma, ("IMAD.WIDE", " R82, R1, R2, R4"), wait],
    ):
        assert len(overwritten(loop)) == 1
    assert overwritten([wgmma]) == ["no wait for HGMMA.64x64x16.F32 R24, R80, gdesc[UR8], R24, gsb0"]


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["symmetric", "zeros", "act_order"])
@pytest.mark.parametrize(("k", "n", "group"), [(1024, 264, 32), (2048, 192, 64), (4096, 520, 128), (1536, 136, 1536)])
def test_the_replay_gives_the_kernels_bits(k: int, n: int, group: int, form: str, dtype: torch.dtype) -> None:
    """By the recipe and, with the table's slices replaced, for other slices and tiles."""
    if form == "act_order" and group == k:
        pytest.skip("one group has no order")
    here = detect()
    assert here is not None
    weight = random_weight(k, n, group, dtype=dtype, symmetric=form == "symmetric", act_order=form == "act_order", seed=k)
    if form == "zeros":
        zeros = torch.arange(weight.zeros.numel()).reshape(weight.zeros.shape) % 17
        weight = replace(weight, zeros=zeros.to(torch.uint8))
    weight = weight.to("cuda")
    own = kernel(NAME)
    packed = own.pack(weight)
    tiles = {1: (16, 128), 17: (64, 128), 256: (128, 128)}
    for m in (1, 3, 16, 17, 64, 100, 256, 1000):
        x = random_activations(m, k, dtype=dtype, seed=m).to("cuda")
        problem = Problem.of(weight, m)
        scheme = scheme_of(NAME, problem, here)
        runs = [(own.run(x, packed), scheme)]
        for choice in (Choice(1), Choice(3), Choice(3, tile(*tiles[m], 8 if m > 16 else 4))) if m in tiles else ():
            cut = replace(scheme, cut=Ranges(m, n, tuned.ranges(k, choice.slices)))
            runs.append((own.run_as(x, packed, choice), cut))  # type: ignore[attr-defined]
        for y, s in runs:
            error = (y.double() - oracle(x, weight)).norm() / oracle(x, weight).norm()
            assert error < (2e-3 if dtype == torch.float16 else 1.6e-2), f"M={m}: relative L2 {float(error):.1e} from float64"
            want = replay(assemble(s, problem), x, weight, engine="cuda")
            wrong = int((y.view(torch.int16) != want.view(torch.int16)).sum())
            assert wrong == 0, f"M={m}, {s.cut.text(here.sms)}: {wrong} of {y.numel()} differ from the replay"


@pytest.mark.gpu
def test_graphs_and_streams() -> None:
    """Calls captured in graphs, replayed on another stream beside plain calls, give the same bits again and again."""
    own, weight = kernel(NAME), random_weight(4096, 512).to("cuda")
    x, packed = random_activations(16, 4096).to("cuda"), own.pack(weight)
    want = own.run_as(x, packed, Choice(8))  # type: ignore[attr-defined]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = [own.run_as(x, packed, Choice(8)) for _ in range(8)]  # type: ignore[attr-defined]
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        plain = [own.run_as(x, packed, Choice(8)) for _ in range(8)]  # type: ignore[attr-defined]
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in (*captured, *plain))
