"""Triton kernels, qlab's and vLLM's: the compiler does what the recipes rest on, and recorded outputs are replayed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlab import data
from qlab.backends.registry import Problem
from qlab.compare import digest
from qlab.errors import UnsupportedError
from qlab.hardware import gpu
from qlab.lab.run import SAME, Layer
from qlab.lab.sources import Request, same_weights
from qlab.recipe import Chain, Fma, Recipe, TensorCore, join, nodes, unfold, value_type
from qlab.recipes import DEFAULT, Build, recipe
from qlab.recipes.rules import dot_order
from qlab.recipes.triton import KERNELS, VERSIONS, slices
from qlab.replay import missing, replay

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem(M=16, K=1024, N=256, group_size=128, dtype=torch.float16, symmetric=False, act_order=False)
SUMS = sorted(KERNELS.keys() - {"triton.awq_dequantize"})


def installed_triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def chains(r: Recipe) -> list[Chain]:
    return [n for region in r.regions for n in nodes(region.tree) if isinstance(n, Chain)]


def test_order_of_a_dot() -> None:
    assert dot_order(64, 2).tolist() == list(range(64))
    first, second, third, last = dot_order(32, 4).reshape(4, 8).tolist()
    assert first == [0, 1, 4, 5, 8, 9, 12, 13]
    assert second == [16, 17, 20, 21, 24, 25, 28, 29]
    assert third == [2, 3, 6, 7, 10, 11, 14, 15]
    assert last == [18, 19, 22, 23, 26, 27, 30, 31]
    assert np.array_equal(dot_order(64, 4), np.r_[dot_order(32, 4), dot_order(32, 4) + 32])
    assert dot_order(64, 8)[:8].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]


def test_slices_are_the_launchers() -> None:
    pytest.importorskip("triton")
    from qlab.triton_kernels import launch

    for k in (*range(8, 600, 8), 1000, 1024, 4096, 4000, 14336):
        for group in (g for g in (32, 64, 96, 128, k) if k % g == 0 and (g % 32 == 0 or g == k)):
            count, rows = launch.slices(k, launch.split_count(k), launch.block_k(k, k // group))
            assert slices(k, group) == [(s * rows, min((s + 1) * rows, k)) for s in range(count)]


@pytest.mark.parametrize("name", SUMS)
def test_sums_ascend(name: str) -> None:
    for key, m, act_order in (("h100", 16, False), ("a100", 300, "gptq" in name)):
        r = recipe(name, replace(PROBLEM, M=m, act_order=act_order), gpu(key))
        assert (r.weights, r.rows, len(r.regions)) == ("rounded", "natural", 1)
        parts = chains(r)
        assert len(parts) == (8 if name.endswith("splitk") else 1)
        assert np.array_equal(np.concatenate([unfold(c.walk) for c in parts]), np.arange(1024))
        assert {c.step for c in parts} == {TensorCore.of(gpu(key).step)}
        assert r.regions[0].tree == join(parts)


def test_slices_of_vllms_kernel() -> None:
    """Slice z takes the chunks of 32 that awq_gemm's takes, with every second pair of k first, in fp16."""
    rule = partial(recipe, "vllm.awq_triton", replace(PROBLEM, K=544))
    parts = [unfold(c.walk).tolist() for c in chains(rule(gpu("a100"))) if c.walk]
    assert sorted(len(p) for p in parts) == [64] * 7 + [96]
    by_slice = {p[0] // 32: p for p in parts}
    assert by_slice[0] == [c + k for c in (0, 256, 512) for k in dot_order(32, 4).tolist()]
    assert by_slice[3][:8] == [96, 97, 100, 101, 104, 105, 108, 109]
    assert {value_type(c) for c in chains(rule(gpu("h100")))} == {"fp16"}
    before = [c for c in chains(rule(gpu("t4"))) if c.walk]
    assert {c.step for c in before} == {Fma("fp16")}
    assert unfold(before[0].walk)[:64].tolist() == [*range(32), *range(256, 288)]


def test_what_is_not_known_is_refused() -> None:
    h100 = gpu("h100")
    for name in (*SUMS, "vllm.awq_triton"):
        with pytest.raises(UnsupportedError, match=r"^Triton 3\.4\.0 may order k otherwise than 3\.5\.1, .* was read$"):
            recipe(name, PROBLEM, h100, replace(DEFAULT, triton="3.4.0"))
        with pytest.raises(UnsupportedError, match=r"code for compute capability 7\.0 was not read, only"):
            recipe(name, PROBLEM, h100, Build(target="sm_70"))
        with pytest.raises(UnsupportedError, match=r"compute capability 11\.0 was not read"):
            recipe(name, PROBLEM, h100, Build(target="sm_110"))
    with pytest.raises(UnsupportedError, match=r"7\.5 was not read"):
        recipe("triton.awq_gemm", PROBLEM, h100, Build(target="sm_75"))
    assert recipe("triton.awq_gemm", PROBLEM, h100, Build(target="sm_80")) == recipe("triton.awq_gemm", PROBLEM, h100)
    assert recipe("triton.awq_dequantize", PROBLEM, h100).opaque


COMPILE = '''
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlab.backends.vllm_awq_triton import module
from tests.cross_compile import specs

def multiplied(ptx):
    """Without the fma onto -0 that multiplies two bf16 numbers before sm_90."""
    for zero in re.findall(r"mov\\.b16 \\s*(%rs\\d+), 0x8000;", ptx):
        ptx = re.sub(r"fma\\.rn\\.bf16 [^;]*, " + zero + ";", "", ptx)
    return ptx

def facts(kernel, signature, constants, aligned, arch, options):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else signature[n] for n in names}
    source = ASTSource(kernel, kinds, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    return {
        "arch": arch,
        "constants": constants,
        "widths": sorted(set(re.findall(r"kWidth = (\\d+)", built.asm["ttgir"]))),
        "mma": re.findall(r"mma\\.sync\\.aligned\\.(\\S+)\\s*{([^}]*)}, {[^}]*}, {[^}]*}, {([^}]*)};", ptx),
        "wgmma": re.findall(r"wgmma\\.mma_async\\.sync\\.aligned\\.(\\S+)\\s*{([^}]*)}, %rd\\d+, %rd\\d+,", ptx),
        "others": re.findall(r"(?:add|sub|fma)\\.[a-z.0-9]*f(?:32|16)\\w*", multiplied(ptx)),
        "flushed": ".ftz" in ptx,
    }

ours = []
for name, spec in specs().items():
    for v in spec.variants:
        if v.label in json.loads(sys.argv[1]) and name.endswith("_gemm"):
            for arch in (80, 90):
                ours.append(facts(spec.kernel, v.signature, dict(v.constants), v.aligned, arch, dict(v.options)))
theirs, found = [], module()
if hasattr(found, "awq_gemm_kernel"):
    kernel = found.awq_gemm_kernel
    pointers = {"a_ptr": "*fp16", "b_ptr": "*i32", "c_ptr": "*fp16", "zeros_ptr": "*i32", "scales_ptr": "*fp16"}
    signature = pointers | dict.fromkeys(("M", "N", "K", "group_size"), "i32")
    constants = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "SPLIT_K": 8}
    theirs = [facts(kernel, signature, constants, (*pointers, "N", "K", "group_size"), arch, {}) for arch in (75, 80, 90)]
print(json.dumps({"ours": ours, "theirs": theirs, "missing": getattr(found, "reason", "")}))
'''
LABELS = (
    "fp16 to fp16, m16 k64, aligned",
    "bf16 to bf16, m64 k64 tail, ragged",
    "fp16 to fp32, m64 k32 act-order, aligned",  # GPTQ's alone
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Facts about the code of some specialisations. In a process of its own, for this one may have chosen the interpreter."""
    if installed_triton() not in VERSIONS:
        pytest.skip(f"the recipes rest on Triton {', '.join(VERSIONS)}; installed: {installed_triton() or 'none'}")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-c", COMPILE, json.dumps(LABELS)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_one_accumulator_takes_k_in_order(compiled: dict[str, Any]) -> None:
    """Each accumulator takes every 16 k of the dot, itself the addend; nothing else adds, and nothing is flushed to zero."""
    assert len(compiled["ours"]) == 2 * (2 * len(LABELS) - 1)
    for f in compiled["ours"]:
        times = f["constants"]["BLOCK_K"] // 16
        assert (f["others"], f["flushed"]) == ([], False)
        if f["arch"] == 90 and f["constants"]["BLOCK_M"] == 64:
            assert (f["mma"], f["widths"]) == ([], [])
            assert Counter(a for _, a in f["wgmma"]).most_common() == [(f["wgmma"][0][1], times)]
            assert all(re.fullmatch(r"m64n64k16\.f32\.b?f16\.b?f16", i) for i, _ in f["wgmma"])
        else:
            assert (f["wgmma"], f["widths"]) == ([], ["2"])
            assert all(re.fullmatch(r"m16n8k16\.row\.col\.f32\.b?f16\.b?f16\.f32", i) for i, _, _ in f["mma"])
            assert all(into == addend for _, into, addend in f["mma"])
            assert set(Counter(into for _, into, _ in f["mma"]).values()) == {times}


def test_vllms_kernel_adds_in_fp16_and_permutes_k(compiled: dict[str, Any]) -> None:
    if compiled["missing"]:
        pytest.skip(compiled["missing"])
    turing, *others = compiled["theirs"]
    assert (turing["mma"], turing["widths"], set(turing["others"])) == ([], [], {"fma.rn.f16x2"})
    for f in others:
        assert (f["others"], f["flushed"], f["widths"]) == ([], False, ["4"])
        assert {i for i, _, _ in f["mma"]} == {"m16n8k16.row.col.f16.f16.f16.f16"}
        assert all(into == addend for _, into, addend in f["mma"])
        assert set(Counter(into for _, into, _ in f["mma"]).values()) == {2}


RECORDED = sorted(p for kind in ("same", "bf16") for p in (ROOT / "results").glob(f"*/model-{kind}.json"))
LAYERS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")


def layers(dtype: torch.dtype) -> Iterator[Layer]:
    """LAYERS of the shipped model as ``python -m qlab.kernels`` gives them to the kernels; later ones are not computed."""
    directories = data.model_directory("gptq"), data.model_directory("fp16")
    found = same_weights(directories[0], Request(dtype, 16, data.heldout_text(), "model.layers.0.*"), original=directories[1])
    yield from (layer for layer, _ in zip(found, range(4), strict=False) if layer.name in LAYERS)


def test_there_are_recorded_outputs() -> None:
    assert RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recorded_outputs_are_replayed(path: Path) -> None:
    """Whole outputs, by digest."""
    pytest.importorskip("transformers")
    if missing("native"):
        pytest.skip(missing("native"))
    result = json.loads(path.read_text())
    recorded = {(c["layer"], c["key"]): c["digest"] for c in result["cells"]}
    given = {i["layer"]: i["input_digest"] for i in result["inputs"]}
    build, half = Build(triton=result["environment"]["triton"]), result["dtype"] == "float16"
    compared = Counter[str]()
    for layer in layers(torch.float16 if half else torch.bfloat16):
        weight, x = layer.weights[SAME], layer.inputs[SAME]
        assert digest(x) == given[layer.name]
        outputs: dict[str, str] = {}
        for name in (*SUMS, *["vllm.awq_triton"] * half):
            r = recipe(name, Problem.of(weight, len(x)), gpu(path.parent.name), build)
            outputs[r.hash] = outputs.get(r.hash) or digest(replay(r, x, weight, engine="native"))
            assert outputs[r.hash] == recorded[layer.name, name], f"{name} on {layer.name}"
            compared[name] += 1
    assert compared == dict.fromkeys((*SUMS, *["vllm.awq_triton"] * half), len(LAYERS))
