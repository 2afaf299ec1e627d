import pytest
import torch

from qlab.errors import WeightError
from qlab.packing import awq, gptq
from qlab.quantize import rtn


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_weight_moves_more_than_half_a_step(matrix, group, symmetric, dtype):
    w = matrix(256, 24)
    q = rtn.quantize(w.float(), group, symmetric, dtype, name="layer")
    assert (q.group_size, q.symmetric, q.dtype, q.name) == (256 if group == -1 else group, symmetric, dtype, "layer")
    assert not q.act_order
    step = q.scales.double()[q.group_index.long()]
    moved = (q.dequantize(torch.float64) - w).abs() / step
    assert float(moved.max()) <= 0.5 + 15 * torch.finfo(dtype).eps
    assert float(moved.max()) > 0.4


def test_every_asymmetric_weight_fits_both_awq_and_gptq_v1(matrix):
    w = matrix(128, 16)
    w[:, :4] = w[:, :4].abs()  # without care the zero point of these is 0, which GPTQ v1 cannot hold
    w[:, 4:8] = -w[:, 4:8].abs()
    q = rtn.quantize(w, 64, False)
    assert awq.unpack(awq.pack(q)).equals(q)
    assert gptq.unpack(gptq.pack(q, version=1)).equals(q)


def test_group_and_column_are_named_for_what_is_not_finite(matrix):
    w = matrix(64, 8)
    w[17, 3] = float("nan")
    with pytest.raises(WeightError, match=r"weight 'up': \(k, n\) = \(17, 3\) is not finite"):
        rtn.quantize(w, 32, True, name="up")


def test_refusals(matrix):
    with pytest.raises(WeightError, match="K=96 is not a multiple of the group size 64"):
        rtn.quantize(matrix(96, 8), 64, True)
    with pytest.raises(WeightError, match="floating-point"):
        rtn.quantize(torch.ones(64, 8, dtype=torch.int32), 64, True)


def test_all_zero_groups_decode_to_zero(matrix):
    w = matrix(128, 8)
    w[:64, 2] = 0
    for symmetric in (True, False):
        q = rtn.quantize(w, 64, symmetric)
        assert bool((q.dequantize(torch.float64)[:64, 2] == 0).all())
        assert float(q.scales[0, 2]) > 0
