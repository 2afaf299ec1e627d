"""vLLM's adapters against operators of the same schemas, written here from the formulas of their storage.

Each stand-in reads its tensors index by index and multiplies in float64, so that a wrong argument, layout or permutation of
the adapter shows on a CPU. The real operators are met by the GPU tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.backends import vllm_awq, vllm_gptq, vllm_machete, vllm_marlin
from qlab.backends.registry import Problem, Support, kernel, kernels
from qlab.backends.vllm_kernel import VllmKernel
from qlab.errors import PackingError
from qlab.inputs import random_activations, random_weight
from qlab.lab.probe import probe
from qlab.packing import exllama, marlin
from qlab.weights import Int4Weight

NAMES = [k.name for k in kernels() if isinstance(k, VllmKernel) and k.name != "vllm.awq_triton"]
UINT4, UINT4B8 = 1125899906843648, 1125899907892224
INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]
SCHEMAS = (
    "awq_gemm(Tensor _in_feats, Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, SymInt split_k_iters) -> Tensor",
    "awq_dequantize(Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, SymInt split_k_iters, int thx, int thy) -> Tensor",
    "gptq_gemm(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, Tensor b_g_idx, bool use_exllama, "
    "bool use_v2_format, int bit) -> Tensor",
    "gptq_shuffle(Tensor! q_weight, Tensor q_perm, int bit) -> ()",
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, Tensor? a_scales, "
    "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, "
    "int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, "
    "bool is_zp_float) -> Tensor",
    "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor",
    "machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, Tensor? group_zeros, "
    "int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) -> Tensor",
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor",
)
"""As vLLM 0.20.2 registers them."""


REDUCTIONS: list[tuple[bool, bool]] = []
"""(use_atomic_add, use_fp32_reduce) of every call of Marlin's stand-in."""


def nibbles(packed: Tensor) -> np.ndarray:
    """int32 [r, c] to uint8 [r, c, 8], nibble by nibble."""
    words = packed.contiguous().numpy().view(np.uint32)
    return np.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).astype(np.uint8)


def awq_columns(packed: Tensor) -> np.ndarray:
    n = nibbles(packed)
    out = np.zeros((n.shape[0], n.shape[1] * 8), np.int64)
    for nibble, column in enumerate(INTERLEAVED):
        out[:, column::8] = n[:, :, nibble]
    return out


def product(x: Tensor, w: np.ndarray) -> Tensor:
    return torch.from_numpy(x.double().numpy() @ w).to(x.dtype)


def spread(groups: np.ndarray, k: int) -> np.ndarray:
    return np.repeat(groups, k // groups.shape[0], axis=0)


def awq_weight(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> np.ndarray:
    q = awq_columns(qweight)
    return (q - spread(awq_columns(qzeros), len(q))) * spread(scales.double().numpy(), len(q))


def awq_gemm(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k: int) -> Tensor:
    assert split_k == 8
    return product(x, awq_weight(qweight, scales, qzeros))


def awq_dequantize(qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k: int, thx: int, thy: int) -> Tensor:
    assert (split_k, thx, thy) == (0, 0, 0)
    return torch.from_numpy(awq_weight(qweight, scales, qzeros)).to(scales.dtype)


def rows_of(qweight: Tensor) -> np.ndarray:
    """int32 [K/8, N] to uint8 [K, N]."""
    return nibbles(qweight).transpose(0, 2, 1).reshape(-1, qweight.shape[1])


def gptq_shuffle(qweight: Tensor, order: Tensor, bit: int) -> None:
    assert bit == 4
    q = rows_of(qweight)
    q = q[order.numpy()] if len(order) else q
    words = np.zeros(tuple(qweight.shape), np.uint32)
    for i, place in enumerate(INTERLEAVED):
        words |= q[place::8].astype(np.uint32) << (4 * i)
    qweight.copy_(torch.from_numpy(words.view(np.int32)))


def gptq_gemm(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, order: Tensor, ex: bool, v2: bool, bit: int
) -> Tensor:
    assert ex
    assert bit == 4
    shuffled = nibbles(qweight)
    q = np.zeros((qweight.shape[0], 8, qweight.shape[1]), np.int64)
    for nibble, place in enumerate(INTERLEAVED):
        q[:, place] = shuffled[:, :, nibble]
    q = q.reshape(-1, qweight.shape[1])
    zeros = nibbles(qzeros).reshape(len(qzeros), -1).astype(np.int64) + (0 if v2 else 1)
    w = (q - spread(zeros, len(q))) * spread(scales.double().numpy(), len(q))
    return product(x[:, order.long()] if len(order) else x, w)


@lru_cache
def marlin_places(k: int, n: int) -> np.ndarray:
    """[K * N, 5]: row, column and nibble of the packed tensor, and the k and n that lie there."""
    out = []
    for kt in range(k // 16):
        for nt in range(n // 64):
            for th in range(32):
                for w in range(4):
                    for i, v in enumerate(INTERLEAVED):
                        kk = 16 * kt + 2 * (th % 4) + (0, 1, 8, 9)[v % 4]
                        out.append((kt, 128 * nt + 4 * th + w, i, kk, 64 * nt + 16 * w + th // 4 + 8 * (v // 4)))
    return np.array(out)


def gptq_marlin_repack(qweight: Tensor, order: Tensor, k: int, n: int, bits: int, a8: bool) -> Tensor:
    assert bits == 4
    assert not a8
    q = rows_of(qweight)
    q = q[order.numpy()] if len(order) else q
    at = marlin_places(k, n)
    words = np.zeros((k // 16, 2 * n), np.uint32)
    np.bitwise_or.at(words, (at[:, 0], at[:, 1]), q[at[:, 3], at[:, 4]].astype(np.uint32) << (4 * at[:, 2]).astype(np.uint32))
    return torch.from_numpy(words.view(np.int32))


def marlin_gemm(
    x, c, qweight, bias, scales, a_scales, global_scale, qzeros, groups, order, locks, kind, m, n, k, *flags
) -> Tensor:  # type: ignore[no-untyped-def]
    assert (c, bias, a_scales, global_scale) == (None,) * 4
    assert locks.dtype == torch.int32
    assert not locks.any()
    assert (m, k) == tuple(x.shape)
    k_full, atomic, fp32, zp_float = flags
    assert k_full
    assert not zp_float
    REDUCTIONS.append((atomic, fp32))
    at = marlin_places(k, n)
    q = np.zeros((k, n), np.int64)
    q[at[:, 3], at[:, 4]] = nibbles(qweight)[at[:, 0], at[:, 1], at[:, 2]]
    s, z = np.zeros((len(scales), n)), np.full((len(scales), n), 8)
    stored, zeros = scales.double().numpy(), nibbles(qzeros)
    for b, i, j in np.ndindex(n // 64, 8, 8):
        if len(scales) > 1:
            s[:, 64 * b + i + 8 * j] = stored[:, 64 * b + 8 * i + j]
        if kind == UINT4:
            z[:, 64 * b + i + 8 * INTERLEAVED[j]] = zeros[:, 8 * b + i, j]
    for b, i, j in np.ndindex(n // 32, 4, 8):
        if len(scales) == 1:
            s[:, 32 * b + 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]] = stored[:, 32 * b + 8 * i + j]
    assert kind == UINT4 or (kind == UINT4B8 and qzeros.numel() == 0)
    if len(order):
        assert torch.equal(groups.long(), torch.arange(k) // (k // len(scales)))
        x = x[:, order.long()]
    return product(x, (q - spread(z, k)) * spread(s, k))


def machete_prepack_b(qweight: Tensor, a_type: torch.dtype, kind: int, scales_type: torch.dtype) -> Tensor:
    assert qweight.stride(0) == 1
    assert a_type == scales_type
    return qweight.contiguous()


def machete_mm(x, qweight, kind, out_type, scales, zeros, group_size, channel, token, schedule) -> Tensor:  # type: ignore[no-untyped-def]
    assert (out_type, channel, token, schedule) == (None,) * 4
    q, k = rows_of(qweight).astype(np.int64), x.shape[1]
    assert group_size in (-1, 64, 128)
    assert len(scales) == (1 if group_size == -1 else k // group_size)
    s = spread(scales.double().numpy(), k)
    if kind == UINT4B8:
        assert zeros is None
        w = (q - 8) * s
    else:
        w = q * s + spread(zeros.double().numpy(), k)
    return product(x, torch.from_numpy(w).to(x.dtype).double().numpy())


OPERATORS = (awq_gemm, awq_dequantize, gptq_gemm, gptq_shuffle, marlin_gemm, gptq_marlin_repack, machete_mm, machete_prepack_b)


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    found = torch.library.Library("qlab_stand_in", "DEF")
    for schema, operator in zip(SCHEMAS, OPERATORS, strict=True):
        name = found.define(schema)
        found.impl(name.split("::")[-1], operator, "CPU")
    yield found
    found._destroy()


@pytest.fixture
def stand_ins(library: torch.library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's operators replaced by the stand-ins, on a CPU that passes for Hopper."""
    for module in (vllm_awq, vllm_gptq, vllm_marlin, vllm_machete):
        monkeypatch.setattr(module, "operators", lambda: torch.ops.qlab_stand_in)
    monkeypatch.setattr(vllm_marlin, "workspace", lambda device: torch.zeros(132, dtype=torch.int32))

    def supports(self: VllmKernel, problem: Problem, device: torch.device) -> Support:
        reason = self.refusal(problem, (9, 0))
        return Support(not reason, reason)

    monkeypatch.setattr(VllmKernel, "supports", supports)


def weights() -> Iterator[Int4Weight]:
    for dtype in (torch.float16, torch.bfloat16):
        for group in (32, 64, 128, 256):
            yield random_weight(256, 128, group, dtype=dtype, seed=group, name=f"asymmetric {group} {dtype}")
            yield random_weight(256, 128, group, dtype=dtype, symmetric=True, seed=group, name=f"symmetric {group} {dtype}")
            if group < 256:
                yield random_weight(
                    256, 128, group, dtype=dtype, symmetric=True, act_order=True, seed=9, name=f"act {group} {dtype}"
                )
    yield random_weight(128, 128, 128, seed=3, name="one ordinary group")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_feeds_its_operator_the_weight_it_was_given(name: str) -> None:
    """One-hot rows return the decoded weight bit for bit, and products are float64's rounded once."""
    k, ran = kernel(name), []
    for weight in weights():
        if not k.supports(Problem.of(weight, 3), weight.device).ok:
            continue
        found = probe(k, weight)
        assert (found.reason, found.mismatches, found.diagnosis) == ("", 0, ""), weight.name
        x = random_activations(3, weight.K, dtype=weight.dtype, seed=7)
        decoded = k.decoded(weight) if "machete" in name or name == "vllm.awq_dequantize" else weight.dequantize(torch.float64)
        want = (x.double() @ decoded.double()).to(x.dtype)
        torch.testing.assert_close(k.run(x, k.pack(weight)), want, rtol=2e-3, atol=2e-3)
        ran.append(weight.name)
    assert len(ran) >= 3


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_code_zero_point_scale_or_group_shows_where_it_is(name: str) -> None:
    """The check above can fail: the weight that is packed differs from the expected one in one place."""
    k = kernel(name)
    symmetric = k.source == "gptq"
    weight = random_weight(256, 128, 64, symmetric=symmetric, act_order=name == "vllm.marlin.gptq", seed=1)
    changes = [replace(weight, codes=_bumped(weight.codes, 77, 41)), replace(weight, scales=_bumped(weight.scales, 2, 41))]
    if not symmetric:
        changes.append(replace(weight, zeros=_bumped(weight.zeros, 2, 41)))
    for changed in changes:
        found = probe(k, changed, weight)
        assert 1 <= found.mismatches <= 64
        assert {fault.n for fault in found.faults} == {41}


def _bumped(values: Tensor, row: int, column: int) -> Tensor:
    """One element moved to another value that the layouts can hold."""
    out = values.clone()
    out[row, column] = (out[row, column] + 1) % 15 + 1 if values.dtype == torch.uint8 else 2 * out[row, column]
    return out


@pytest.mark.usefixtures("stand_ins")
def test_marlin_asks_for_its_reduction() -> None:
    weight = random_weight(128, 64, symmetric=True, seed=5)
    x = random_activations(1, 128, seed=6)
    for kind in ("awq", "gptq"):
        for suffix, flags in (("", (False, True)), (".fp16", (False, False)), (".atomic", (True, True))):
            k = kernel(f"vllm.marlin.{kind}{suffix}")
            k.run(x, k.pack(weight))
            assert REDUCTIONS[-1] == flags


def storage_is_ours(device: str) -> None:
    """What the repacking operators write is what qlab.packing writes, for the same order of rows."""
    for act in (False, True):
        weight = random_weight(256, 128, 32, symmetric=True, act_order=act, seed=8).to(device)
        packed = kernel("vllm.marlin.gptq").pack(weight).tensors
        ours = marlin.pack(weight, "uint4b8", perm=packed["order"] if act else None)
        for name, tensor in (("qweight", ours.qweight), ("scales", ours.scales), ("groups", ours.g_idx), ("order", ours.perm)):
            assert torch.equal(packed[name], tensor), name
        packed = kernel("vllm.gptq_gemm").pack(weight).tensors
        rows = exllama.pack(weight, 1, perm=packed["order"] if act else None)
        for name, tensor in (("qweight", rows.qweight), ("qzeros", rows.qzeros), ("scales", rows.scales)):
            assert torch.equal(packed[name], tensor), name
    weight = random_weight(256, 128, 32, seed=8).to(device)
    assert torch.equal(kernel("vllm.marlin.awq").pack(weight).tensors["qzeros"], marlin.pack(weight, "uint4").zeros)


@pytest.mark.usefixtures("stand_ins")
def test_repacked_storage_is_that_of_our_packing() -> None:
    storage_is_ours("cpu")


@pytest.mark.gpu
@pytest.mark.vllm
def test_the_real_operators_storage_is_that_of_our_packing() -> None:
    support = kernel("vllm.marlin.gptq").supports(Problem.of(random_weight(128, 64, symmetric=True), 1), torch.device("cuda"))
    if not support.ok:
        pytest.skip(support.reason)
    storage_is_ours("cuda")


@pytest.mark.gpu
@pytest.mark.vllm
def test_every_stream_has_its_own_locks_and_the_kernel_leaves_them_zero() -> None:
    k, weight = kernel("vllm.marlin.gptq"), random_weight(4096, 256, symmetric=True).to("cuda")
    support = k.supports(Problem.of(weight, 1), weight.device)
    if not support.ok:
        pytest.skip(support.reason)
    here, other = vllm_marlin.workspace(weight.device), torch.cuda.Stream()
    packed, x = k.pack(weight), random_activations(16, 4096).to("cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        there = vllm_marlin.workspace(weight.device)
        outputs = [k.run(x, packed) for _ in range(20)]
    outputs += [k.run(x, packed) for _ in range(20)]
    torch.cuda.synchronize()
    assert here is vllm_marlin.workspace(weight.device)
    assert here is not there
    assert not here.any()
    assert not there.any()
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.usefixtures("stand_ins")
def test_gptq_gemm_takes_the_version_that_holds_the_zero_points() -> None:
    w = random_weight(64, 64, 32, seed=2)
    for zero in (0, 16):
        weight = replace(w, zeros=torch.where(w.zeros == 7, torch.tensor(zero, dtype=torch.uint8), w.zeros))
        found = probe(kernel("vllm.gptq_gemm"), weight)
        assert (found.reason, found.mismatches) == ("", 0)
    both = w.zeros.clone()
    both[0, 0], both[0, 1] = 0, 16
    with pytest.raises(PackingError, match="both 0 and 16"):
        kernel("vllm.gptq_gemm").pack(replace(w, zeros=both))


def test_machete_awq_decodes_with_one_rounding_of_a_fused_multiply_add() -> None:
    k = kernel("vllm.machete.awq")
    for dtype in (torch.float16, torch.bfloat16):
        w = random_weight(128, 128, 64, dtype=dtype, seed=4)
        g = w.group_index.long()
        scales, zeros = w.scales.double(), w.zeros.double()
        zs = (-scales * zeros).to(dtype).double()  # exact in float64, rounded once
        want = (w.codes.double() * scales[g] + zs[g]).to(torch.float32).to(dtype)  # 16 bits: exact in float32
        assert torch.equal(k.decoded(w), want)
        assert not torch.equal(want, w.dequantize(dtype))  # or Machete would be like every other kernel
    assert torch.equal(kernel("vllm.machete.gptq").decoded(w), w.dequantize(w.dtype))


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("name", [*NAMES, "vllm.awq_triton"])
def test_the_real_operator_decodes_the_weight(name: str) -> None:
    """On a GPU with vLLM's extension: the one-hot probe of the real kernel, for every weight that it holds."""
    k, ran = kernel(name), 0
    for weight in weights():
        weight = weight.to("cuda")
        if reason := k.supports(Problem.of(weight, 16), weight.device).reason:
            if "not found" in reason or "Hopper" in reason:
                pytest.skip(reason)
            continue
        found = probe(k, weight)
        assert (found.reason, found.mismatches, found.diagnosis) == ("", 0, ""), weight.name
        ran += 1
    assert ran
