import pytest
import torch

from qlab.errors import WeightError
from qlab.quantize import awq, rtn
from qlab.quantize.fold import storable
from qlab.quantize.statistics import Statistics, output_error


def effective(q):
    """What the layer multiplies its unscaled input with, float64 [K, N]."""
    w = q.dequantize(torch.float64)
    return w if q.input_scale is None else w / q.input_scale.double()[:, None]


def error(q, w, statistics):
    return float(output_error(effective(q) - w, statistics.gram).sum().sqrt())


@pytest.mark.parametrize("symmetric", [True, False])
def test_output_error_on_other_activations_is_well_below_round_to_nearest(activations, matrix, symmetric):
    x, w = activations(3000, 256), matrix(256, 64)
    statistics, fresh = Statistics.of(x[:2000]), Statistics.of(x[2000:])
    plain = error(rtn.quantize(w, 64, symmetric), w, fresh)
    (clipped,) = awq.quantize_unit([w], statistics, 64, symmetric)
    (scaled,) = awq.quantize_unit([w], statistics, 64, symmetric, clip=False)
    assert error(scaled, w, fresh) < 0.81 * plain  # measured: 0.77 symmetric, 0.69 asymmetric
    assert error(clipped, w, fresh) < 0.68 * plain  # measured: 0.64 both


def test_loud_channels_get_a_larger_scale(activations, matrix):
    x = activations(1500, 128)
    s = awq.search_scale([matrix(128, 32)], Statistics.of(x), 32, False)
    loud = torch.arange(128) % 16 == 5
    assert s.dtype == torch.float32
    assert float(s[loud].min()) > 1.5 * float(s[~loud].max())
    assert float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_the_search_never_loses_to_round_to_nearest_where_it_looked(activations, matrix, symmetric, group):
    statistics = Statistics.of(activations(500, 128))
    for seed in range(3):
        w = matrix(128, 16, seed)
        plain = error(rtn.quantize(w, group, symmetric), w, statistics)
        (q,) = awq.quantize_unit([w], statistics, group, symmetric, clip=False)
        assert error(q, w, statistics) <= plain * (1 + 1e-9)


def test_clipping_lowers_the_error_of_columns_and_raises_none(activations, matrix):
    statistics, w = Statistics.of(activations(800, 128)), matrix(128, 32)
    w[7] *= 6  # a few weights that stretch their group's range and meet a quiet input
    clipped = awq.quantize_scaled(w, statistics.gram, 64, True)
    plain = awq.quantize_scaled(w, statistics.gram, 64, True, clip=False)
    assert plain.equals(rtn.quantize(w, 64, True))
    columns = [output_error(effective(q) - w, statistics.gram) for q in (clipped, plain)]
    assert bool((columns[0] <= columns[1]).all())
    assert float(columns[0].sum()) < 0.8 * float(columns[1].sum())


def test_clipping_looks_at_the_scaled_input(activations, matrix):
    """With the same scaled problem given in two ways, scale beside the weight or inputs divided already, codes agree."""
    x, w = activations(600, 64), matrix(64, 16)
    s = torch.linspace(0.25, 4, 64)
    beside = awq.quantize_scaled(w, Statistics.of(x).gram, 32, False, input_scale=s)
    divided = awq.quantize_scaled(w, Statistics.of(x / s.double()).gram, 32, False)
    assert torch.equal(beside.codes, divided.codes)
    assert beside.input_scale is s
    unscaled = awq.quantize_scaled(w, Statistics.of(x).gram, 32, False)
    assert not torch.equal(beside.codes, unscaled.codes)


def test_weights_that_share_an_input_get_one_scale_searched_over_all(activations, matrix):
    statistics = Statistics.of(activations(500, 128))
    a, b = matrix(128, 16), matrix(128, 48, seed=1)
    first, second = awq.quantize_unit([a, b], statistics, 64, False)
    assert torch.equal(first.input_scale, second.input_scale)
    whole = awq.search_scale([torch.cat([a, b], 1)], statistics, 64, False)
    assert torch.equal(whole, first.input_scale)


def test_dead_inputs_and_zero_groups_give_a_finite_positive_scale(activations, matrix):
    x, w = activations(400, 128), matrix(128, 16)
    x[:, 40:72] = 0
    w[:64, 3] = 0
    w[5] = 0
    (q,) = awq.quantize_unit([w], Statistics.of(x), 64, False)
    assert bool((q.input_scale > 0).all())
    assert bool((effective(q)[:64, 3] == 0).all())
    (silent,) = awq.quantize_unit([w], Statistics.of(torch.zeros(10, 128)), 64, False)
    assert bool((silent.input_scale > 0).all())


def test_runs_repeat(activations, matrix):
    def run():
        (q,) = awq.quantize_unit([matrix(128, 16)], Statistics.of(activations(400, 128)), 64, False)
        return q.digest()

    assert run() == run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_storable_scale_is_what_the_rounded_norm_really_divides_by(dtype):
    norm = torch.linspace(-2, 2, 401, dtype=torch.float64)
    norm[200] = 0
    wanted = torch.logspace(-1.5, 1.5, 401, dtype=torch.float64).float()
    s = storable(wanted, norm, dtype)
    stored = (norm / s.double()).to(dtype)
    kept = norm != 0
    assert s.dtype == torch.float32
    # One float32 rounding of s is all that is left: norm / s is within 2^-24 of the stored value.
    assert float(((norm / s.double()) / stored.double() - 1).abs()[kept].max()) <= 2**-24
    assert float((s / wanted - 1).abs()[kept].max()) <= torch.finfo(dtype).eps / 2 + 2**-23
    assert not torch.equal(s[kept], wanted[kept])
    assert float(s[~kept]) == 1.0


def test_a_norm_that_would_vanish_in_fp16_keeps_scale_one():
    s = storable(torch.tensor([1e4, 2.0]), torch.tensor([1e-5, 1.0]), torch.float16)
    assert s.tolist() == [1.0, 2.0]


def test_refusals(activations, matrix):
    with pytest.raises(WeightError, match="K=96 is not a multiple of the group size 64"):
        awq.search_scale([matrix(96, 8)], Statistics.of(activations(50, 96)), 64, True)
    with pytest.raises(WeightError, match="weights have K=64, their inputs 96"):
        awq.search_scale([matrix(64, 8)], Statistics.of(activations(50, 96)), 64, True)
