"""What the launchers refuse, where split-K cuts, and that nothing is launched which the cross-compilation does not cover."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from qlab.errors import UnsupportedError
from qlab.inputs import exact_activations, random_weight
from qlab.packing import awq, gptq

pytest.importorskip("triton")
from qlab.triton_kernels import awq_dequantize, awq_gemm, gptq_gemm, launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def awq_tensors():
    t = awq.pack(random_weight(128, 24, 32).to(DEVICE))
    return [t.qweight, t.qzeros, t.scales]


@pytest.fixture(scope="module")
def gptq_tensors():
    t = gptq.pack(random_weight(128, 24, 32, act_order=True).to(DEVICE))
    return [t.qweight, t.qzeros, t.scales, t.g_idx]


@pytest.fixture
def x():
    return exact_activations(4, 128).to(DEVICE)


@pytest.mark.parametrize(
    ("index", "spoil", "sentence"),
    [
        (0, lambda t: t.long(), "qweight must be int32"),
        (0, lambda t: t[:, :-1].contiguous(), "qweight must be int32"),
        (0, lambda t: t.t().contiguous().t(), "qweight must be contiguous"),
        (1, lambda t: t[:-1].contiguous(), "qzeros must be int32"),
        (2, lambda t: t.float(), "scales must be float16 or bfloat16"),
        (2, lambda t: t[:, :-1].contiguous(), "N a multiple of 8"),
        (2, lambda t: t.t().contiguous().t(), "scales must be contiguous"),
    ],
)
def test_spoilt_tensors_are_named(index, spoil, sentence, awq_tensors, gptq_tensors, x):
    for call, tensors in ((awq_gemm.awq_gemm, awq_tensors), (gptq_gemm.gptq_gemm, gptq_tensors)):
        spoilt = [spoil(t) if i == index else t for i, t in enumerate(tensors)]
        with pytest.raises(UnsupportedError, match=sentence):
            call(x, *spoilt)
    with pytest.raises(UnsupportedError, match=sentence):
        awq_dequantize.awq_dequantize(*(spoil(t) if i == index else t for i, t in enumerate(awq_tensors)))


def test_other_arguments_are_named(awq_tensors, gptq_tensors, x):
    with pytest.raises(UnsupportedError, match="g_idx must be int32"):
        gptq_gemm.gptq_gemm(x, *gptq_tensors[:3], gptq_tensors[3].long())
    with pytest.raises(UnsupportedError, match="GPTQ version 3"):
        gptq_gemm.gptq_gemm(x, *gptq_tensors, version=3)
    with pytest.raises(UnsupportedError, match="split_k=0"):
        awq_gemm.awq_gemm(x, *awq_tensors, split_k=0)
    with pytest.raises(UnsupportedError, match="out must be float16"):
        awq_gemm.awq_gemm(x, *awq_tensors, out=torch.empty(4, 23, dtype=torch.float16, device=DEVICE))
    t = awq.pack(random_weight(96, 8, 48).to(DEVICE))
    with pytest.raises(UnsupportedError, match="a group has 48 rows"):
        awq_gemm.awq_gemm(x[:, :96], t.qweight, t.qzeros, t.scales)


@pytest.mark.parametrize(("k", "n", "groups"), [(296, 24, 9), (8, 24, 9), (0, 24, 1)])
def test_groups_that_do_not_divide_k_are_refused(k, n, groups):
    """296 rows in 9 groups: the 32 rows that a division gives leave a last step in a tenth group, beyond the scales."""
    scales = torch.ones(groups, n, dtype=torch.float16, device=DEVICE)
    zeros = torch.zeros(groups, n // 8, dtype=torch.int32, device=DEVICE)
    x = torch.zeros(2, k, dtype=torch.float16, device=DEVICE)
    by_row = torch.zeros(k, n // 8, dtype=torch.int32, device=DEVICE)
    by_column = torch.zeros(k // 8, n, dtype=torch.int32, device=DEVICE)
    for call in (
        lambda: awq_gemm.awq_gemm(x, by_row, zeros, scales),
        lambda: gptq_gemm.gptq_gemm(x, by_column, zeros, scales),
        lambda: awq_dequantize.awq_dequantize(by_row, zeros, scales),
    ):
        with pytest.raises(UnsupportedError, match=f"K={k} must be a positive multiple of the {groups} groups"):
            call()


def test_a_weight_of_nothing_is_refused(x):
    empty = torch.zeros(0, 24, dtype=torch.float16, device=DEVICE)
    with pytest.raises(UnsupportedError, match=r"not float16 \[0, 24\]"):
        awq_gemm.awq_gemm(x, *(torch.zeros(rows, 3, dtype=torch.int32, device=DEVICE) for rows in (128, 0)), empty)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(x):
    weight, there = random_weight(128, 24, 32), torch.device("cuda:1")
    t, u = awq.pack(weight.to(DEVICE)), awq.pack(weight.to(there))
    want = awq_gemm.awq_gemm(x, t.qweight, t.qzeros, t.scales, split_k=2)
    got = awq_gemm.awq_gemm(x.to(there), u.qweight, u.qzeros, u.scales, split_k=2)
    assert got.device == there
    assert torch.equal(got.cpu(), want.cpu())


def test_out_is_filled_and_returned(awq_tensors, x):
    want = awq_gemm.awq_gemm(x, *awq_tensors)
    for split_k in (1, 2):
        out = torch.full_like(want, float("nan"))
        assert awq_gemm.awq_gemm(x, *awq_tensors, split_k=split_k, out=out) is out
        assert not out.isnan().any()
    out = torch.full((128, 24), float("nan"), dtype=torch.float16, device=DEVICE)
    assert awq_dequantize.awq_dequantize(*awq_tensors, out=out) is out
    assert not out.isnan().any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter runs where there is no GPU")
def test_the_interpreter_refuses_bfloat16(x):
    t = awq.pack(random_weight(128, 24, 32, dtype=torch.bfloat16))
    with pytest.raises(UnsupportedError, match="interpreter"):
        awq_gemm.awq_gemm(x.bfloat16(), t.qweight, t.qzeros, t.scales)


def test_rows_past_k_stay_silent():
    """K = 40 fills no step, and the zero point times the scale overflows fp16: only rows that do not exist would decode so."""
    w = random_weight(40, 8, -1)
    for layout in ("awq", "gptq"):
        spoilt = type(w)(torch.full_like(w.codes, 15), torch.full_like(w.zeros, 14), w.scales * 0 + 60000, w.group_index)
        spoilt = spoilt.to(DEVICE)
        x = torch.zeros(1, 40, dtype=torch.float16, device=DEVICE)
        x[0, 39] = 1
        if layout == "awq":
            t = awq.pack(spoilt)
            y = awq_gemm.awq_gemm(x, t.qweight, t.qzeros, t.scales)
        else:
            t = gptq.pack(spoilt)
            y = gptq_gemm.gptq_gemm(x, t.qweight, t.qzeros, t.scales)
        assert y.unique().tolist() == [60000]


@pytest.mark.parametrize("step", launch.BLOCK_K_SIZES)
def test_slices_cover_k_and_none_is_empty(step):
    for k, split_k in product(range(8, 2100, 8), (1, 2, 3, 7, 8, 100)):
        count, rows = launch.slices(k, split_k, step)
        assert 1 <= count <= split_k
        assert rows % step == 0
        assert (count - 1) * rows < k <= count * rows


def test_split_rule():
    assert [launch.split_count(k) for k in (32, 128, 255, 256, 512, 1024, 4096)] == [1, 1, 1, 2, 4, 8, 8]


class Spy:
    """Stands in for a compiled kernel and keeps what it is launched with."""

    def __init__(self, names):
        self.names, self.launches = names, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((dict(zip(self.names, arguments, strict=False)), options))


@pytest.mark.parametrize("module", [awq_gemm, gptq_gemm, awq_dequantize], ids=lambda m: m.SPEC.name)
def test_every_launch_is_a_compiled_variant(module, monkeypatch):
    """Constants, options and pointer types of launches over all groups, M and dtypes are among the spec's variants."""
    name = module.SPEC.name
    spy = Spy(module.SPEC.kernel.arg_names)
    monkeypatch.setattr(module, f"{name}_kernel", spy)
    monkeypatch.setattr(launch, "check_device", lambda *_: None)
    monkeypatch.setattr(module, "join_partials", lambda partials, out: out, raising=False)
    orders = (False, True) if name == "gptq_gemm" else (False,)
    groups = (32, 64, 96, 128, 256, 200)
    for dtype, group, m, split_k, act_order in product(launch.DTYPES, groups, (1, 16, 17, 300), (1, 2), orders):
        k = 200 if group == 200 else 768
        weight = random_weight(k, 24, group, dtype=dtype, act_order=act_order)
        x = torch.zeros(m, k, dtype=dtype)
        if name == "gptq_gemm":
            t = gptq.pack(weight)
            module.gptq_gemm(x, t.qweight, t.qzeros, t.scales, t.g_idx if weight.act_order else None, split_k=split_k)
        elif name == "awq_gemm":
            t = awq.pack(weight)
            module.awq_gemm(x, t.qweight, t.qzeros, t.scales, split_k=split_k)
        else:
            t = awq.pack(weight)
            module.awq_dequantize(t.qweight, t.qzeros, t.scales)
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
    compiled = [(v.signature, {**v.constants, **v.options}) for v in module.SPEC.variants]
    used = set()
    for arguments, options in spy.launches:
        signature = {n: types[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in arguments.items()}
        matches = [i for i, variant in enumerate(compiled) if variant == (signature, options)]
        assert matches, f"{signature} {options} is not compiled by tests/cross_compile.py"
        used.update(matches)
    assert used == set(range(len(compiled))), "a variant is compiled that nothing launches"
