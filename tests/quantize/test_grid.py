import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import WeightError
from qlab.quantize.grid import TOP, bounds, choose, decode, encode, group_rows, nearest

finite = st.floats(-8, 8, allow_nan=False, width=32)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=12),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    zero_min=st.sampled_from([0, 1]),
)
def test_each_weight_gets_the_nearest_of_the_sixteen_values_and_the_range_is_covered(values, symmetric, dtype, zero_min):
    w = torch.tensor(values, dtype=torch.float64)[None, :, None]
    grid = choose(*bounds(w), symmetric=symmetric, dtype=dtype, zero_min=zero_min)
    scale, zero = float(grid.scales), int(grid.zeros)
    assert scale >= torch.finfo(dtype).tiny
    assert zero == 8 if symmetric else zero_min <= zero <= 15
    table = [(q - zero) * scale for q in range(16)]
    decoded = decode(encode(w, grid), grid).flatten().tolist()
    assert decoded == nearest(w, grid).flatten().tolist()
    for value, got in zip(values, decoded, strict=True):
        least = min(abs(value - t) for t in table)
        assert abs(value - got) <= least + 1e-12 * scale
        # A rounded scale leaves the ends of the range at most 15 of its rounding errors outside.
        assert abs(value - got) <= scale * (0.5 + TOP * torch.finfo(dtype).eps)


def test_the_symmetric_scale_spans_fifteen_steps():
    grid = choose(torch.tensor([[-7.5]]).double(), torch.tensor([[3.0]]).double(), symmetric=True, dtype=torch.float16)
    assert float(grid.scales) == 1.0
    assert int(grid.zeros) == 8


def test_a_positive_group_keeps_zero_point_one_for_gptq_v1_and_still_reaches_its_maximum():
    low, high = torch.zeros(1, 1).double(), torch.full((1, 1), 14.0).double()
    both = choose(low, high, symmetric=False, dtype=torch.float16)
    only_awq = choose(low, high, symmetric=False, dtype=torch.float16, zero_min=0)
    assert (int(both.zeros), float(both.scales)) == (1, 1.0)
    assert int(only_awq.zeros) == 0
    assert float(decode(encode(high, both), both)) == 14.0


def test_codes_are_chosen_for_the_rounded_scale():
    # 1 / 7.5 = 0.13333 is 0.13379 in bf16; 0.6005 is 4.504 steps of the first (code 13) and 4.488 of the second (code 12).
    w = torch.tensor([1.0, 0.6005], dtype=torch.float64)[None, :, None]
    grid = choose(*bounds(w), symmetric=True, dtype=torch.bfloat16)
    assert float(grid.scales) == 0.1337890625
    assert encode(w, grid).flatten().tolist() == [15, 12]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_all_zero_group_gets_a_positive_scale_and_decodes_to_zero(symmetric, dtype):
    w = torch.zeros(2, 4, 3, dtype=torch.float64)
    grid = choose(*bounds(w), symmetric=symmetric, dtype=dtype)
    assert bool((grid.scales == torch.finfo(dtype).tiny).all())
    assert bool((grid.zeros == 8).all())
    assert bool((encode(w[0], grid._replace(scales=grid.scales[:1], zeros=grid.zeros[:1])) == 8).all())


def test_a_range_that_overflows_fp16_is_refused_and_bf16_holds_it():
    low, high = torch.full((1, 1), -1e7).double(), torch.zeros(1, 1).double()
    with pytest.raises(WeightError, match=r"scale 1\.33333e\+06.*use bfloat16"):
        choose(low, high, symmetric=True, dtype=torch.float16)
    assert bool(torch.isfinite(choose(low, high, symmetric=True, dtype=torch.bfloat16).scales).all())


@pytest.mark.parametrize(("k", "group"), [(96, 64), (64, 128), (64, 0), (64, -2), (0, 32)])
def test_k_must_be_a_multiple_of_the_group(k, group):
    with pytest.raises(WeightError, match=f"K={k} is not a multiple of the group size {group}"):
        group_rows(k, group)


def test_scales_are_fp16_or_bf16_and_zero_min_is_known():
    one = torch.ones(1, 1).double()
    with pytest.raises(WeightError, match=r"not torch\.float32"):
        choose(-one, one, symmetric=True, dtype=torch.float32)
    with pytest.raises(WeightError, match="zero_min"):
        choose(-one, one, symmetric=False, dtype=torch.float16, zero_min=2)
