"""vLLM's kernels on the ladder: each rung ends as the table expects. Their adapters check x before an operator sees it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qlab.backends import vllm_awq, vllm_awq_triton, vllm_gptq, vllm_machete, vllm_marlin
from qlab.backends.registry import Packed, Problem, kernel, kernels
from qlab.backends.vllm_kernel import VllmKernel
from qlab.errors import UnsupportedError
from tests import expected_rungs
from tests.expected_rungs import CASES, EXPECTED, Expected, climber, disagreements, expected
from tests.ladder import RUNGS, Case, Result, climb

NAMES = [k.name for k in kernels() if isinstance(k, VllmKernel)]
DTYPES = (torch.float16, torch.bfloat16)
EVERY = [(name, case, dtype) for name in NAMES for case in CASES for dtype in DTYPES]


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_rung_ends_as_expected(name: str, case: Case, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    k = kernel(name)
    plain = k.supports(Problem(16, 256, 256, 128, torch.float16, True, False), device)
    if not plain.ok:
        pytest.skip(plain.reason)
    assert disagreements(climb(climber(k), case, dtype, device), case, dtype) == []


def test_the_table_has_every_kernel_and_rung_and_no_other() -> None:
    assert set(EXPECTED) == {(name, rung.__name__) for name in NAMES for rung in RUNGS}
    for name, case, dtype in EVERY:
        for rung in RUNGS:
            want = expected(name, rung.__name__, case, dtype)
            assert want.status in ("passed", "failed", "refused")
            assert len(want.reason) > 10


@pytest.mark.parametrize(("name", "case", "dtype"), EVERY, ids=str)
def test_a_refusal_is_expected_where_the_adapter_refuses_on_hopper(name: str, case: Case, dtype: torch.dtype) -> None:
    adapter = kernel(name)
    assert isinstance(adapter, VllmKernel)
    problem = Problem(case.m, case.k, case.n, case.group, dtype, True, case.act_order)
    refused = {expected(name, rung.__name__, case, dtype).status == "refused" for rung in RUNGS}
    assert refused == {bool(adapter.refusal(problem, (9, 0)))}


def as_expected(name: str, case: Case, dtype: torch.dtype) -> list[Result]:
    """Results as a kernel that does what the table says would leave them."""
    dtype_name = str(dtype).removeprefix("torch.")
    return [
        Result(r.__name__, name, str(case), dtype_name, "cuda", want.status, "4 of 9 elements" * (want.status == "failed"))
        for r in RUNGS
        for want in [expected(name, r.__name__, case, dtype)]
    ]


@pytest.mark.parametrize("rung", [r.__name__ for r in RUNGS])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_entry_is_noticed(name: str, rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtype = CASES[0], torch.float16
    results = as_expected(name, case, dtype)
    assert disagreements(results, case, dtype) == []
    other = "passed" if expected(name, rung, case, dtype).status == "failed" else "failed"
    monkeypatch.setitem(expected_rungs.EXPECTED, (name, rung), Expected(other, "planted"))
    (sentence,) = disagreements(results, case, dtype)
    assert sentence.startswith(f"{name} {rung} {case} float16: ")
    assert sentence.endswith(f"expected {other}: planted")


def test_a_kernel_that_raises_does_not_pass_for_an_expected_failure() -> None:
    name, case, dtype = "vllm.awq_gemm", CASES[0], torch.float16
    results = [replace(r, detail="RuntimeError: illegal memory access") for r in as_expected(name, case, dtype)]
    raised = [r.rung for r in results if r.status == "failed"]
    assert len(raised) == 4
    assert len(disagreements(results, case, dtype)) == 4
    wrong = [replace(r, detail="M=17: 4 of 9 elements") for r in results]
    assert disagreements(wrong, case, dtype) == []


def packed(dtype: torch.dtype = torch.float16) -> Packed:
    """Tensors that no operator reads here, for K = 64 and N = 32."""
    empty = torch.empty(0)
    tensors = dict.fromkeys(("qweight", "scales", "qzeros", "scaled_zeros", "groups"), empty)
    return Packed(tensors, Problem(0, 64, 32, 32, dtype, True, False))


class Seen:
    """Operators that keep the x they are given and return zeros."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        def operator(x: Tensor, *rest: object) -> Tensor:
            if name == "awq_dequantize":
                return torch.zeros(64, 32, dtype=torch.float16)
            self.x.append(x)
            return torch.zeros(len(x), 32, dtype=x.dtype)

        return operator


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    for module in (vllm_awq, vllm_gptq, vllm_marlin, vllm_machete):
        monkeypatch.setattr(module, "operators", lambda: found)
    monkeypatch.setattr(vllm_awq_triton, "module", lambda: SimpleNamespace(awq_gemm_triton=found.awq_gemm_triton))
    monkeypatch.setattr(vllm_marlin, "workspace", lambda device: None)
    return found


def run(name: str, x: Tensor) -> Tensor:
    given = packed()
    if "machete" not in name:
        given = replace(given, tensors={**given.tensors, "order": torch.empty(0)})
    return kernel(name).run(x, given)


@pytest.mark.parametrize("name", NAMES)
def test_x_that_does_not_fit_never_reaches_the_operator(name: str, seen: Seen) -> None:
    x = torch.ones(4, 64, dtype=torch.float16)
    wrong = {
        "\\[M, 64\\], not \\[4, 56\\]": x[:, :56],
        "\\[M, 64\\], not \\[64\\]": x[0],
        "float32": x.float(),
        "bfloat16": x.bfloat16(),
        "last stride of 4": x.t().contiguous().t(),
        "on meta": x.to("meta"),
    }
    for sentence, bad in wrong.items():
        with pytest.raises(UnsupportedError, match=sentence):
            run(name, bad)
    assert seen.x == []


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_need_no_operator(name: str, seen: Seen) -> None:
    y = run(name, torch.empty(0, 64, dtype=torch.float16))
    assert (tuple(y.shape), y.dtype, seen.x) == ((0, 32), torch.float16, [])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "vllm.awq_dequantize"])
@pytest.mark.parametrize(("width", "start"), [(64, 0), (72, 8), (72, 3), (67, 0)], ids=str)
def test_operators_get_rows_that_they_can_read(name: str, width: int, start: int, seen: Seen) -> None:
    """Marlin takes rows apart by a multiple of 8 elements at an aligned address, the others contiguous rows."""
    wide = torch.arange(5 * width).reshape(5, width).to(torch.float16)
    x = wide[:, start : start + 64]
    run(name, x)
    (got,) = seen.x
    assert torch.equal(got, x)
    if name == "vllm.awq_triton":  # Triton reads elements, at any address
        assert got.is_contiguous()
    elif "marlin" in name:
        assert got.stride(0) % 8 == 0
        assert got.data_ptr() % 16 == 0
        assert (got.data_ptr() == x.data_ptr()) == ((width, start) in ((64, 0), (72, 8)))
    else:
        assert got.is_contiguous()
        assert got.data_ptr() % 16 == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("vllm.awq_dequantize", "vllm.awq_triton")])
def test_contiguous_rows_at_an_odd_address_are_copied(name: str, seen: Seen) -> None:
    x = torch.arange(130).to(torch.float16)[1:129].reshape(2, 64)
    run(name, x)
    assert torch.equal(seen.x[0], x)
    assert seen.x[0].data_ptr() % 16 == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "vllm.awq_dequantize"])
def test_rows_that_share_memory_are_copied(name: str, seen: Seen) -> None:
    x = torch.arange(64).to(torch.float16).expand(3, 64)
    run(name, x)
    assert torch.equal(seen.x[0], x)
    assert seen.x[0].is_contiguous()
