"""Distances of a hybrid from A, by hand on small tensors."""

from __future__ import annotations

import math

import pytest
import torch

from qlab.attribution.measures import LAYER, PROMPT, Measures, Results
from qlab.attribution.result import LOGPROBS, OUTPUT, PROJECTION
from qlab.attribution.subject import Call
from qlab.errors import UnsupportedError


def halves(*rows):
    return torch.tensor(rows, dtype=torch.float16)


CALLS = (Call("up", halves([1.0])), Call("down", halves([1.0])), Call("up", halves([1.0], [1.0]), prompt=1))
"""``up`` is called twice, with one row and, of another prompt, with two."""
ROWS = (1, 1)
A = Results((halves([3.0, 4.0]), halves([2.0]), halves([0.0], [0.0])), torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]]))
B = Results((halves([3.0, 5.0]), halves([1.0]), halves([2.0], [0.0])), torch.tensor([[-1.5, -2.0], [-3.0, -math.inf]]))


def test_distances_by_hand():
    """||A||^2 is 25 for up (its two calls together) and 4 for down; B lies 1 + 4 and 1 away."""
    found = Measures(CALLS, ROWS, A, B).of(B)
    assert found == {
        OUTPUT: 5 / 25 + 1 / 4,
        PROJECTION: 1.0,
        LOGPROBS: 0.25,
        LAYER + "up": 5 / 25,
        LAYER + "down": 1 / 4,
        f"{PROMPT}0 {OUTPUT}": 1 / 25 + 1 / 4,
        f"{PROMPT}1 {OUTPUT}": 4 / 25,
        f"{PROMPT}0 {LOGPROBS}": 0.25,
        f"{PROMPT}1 {LOGPROBS}": 0.0,
    }
    assert not any(Measures(CALLS, ROWS, A, B).of(A).values())


def test_a_hybrid_beside_the_way():
    """It goes half of up's way in its first call, overshoots down's by as much again, and moves where B does not."""
    hybrid = Results((halves([3.0, 4.5]), halves([0.0]), halves([0.0], [3.0])), torch.tensor([[-1.0, -2.0], [-2.0, -math.inf]]))
    found = Measures(CALLS, ROWS, A, B).of(hybrid)
    assert found[LAYER + "up"] == (0.25 + 9) / 25
    assert found[LAYER + "down"] == 4 / 4
    assert found[OUTPUT] == math.fsum([(0.25 + 9) / 25, 1.0])
    assert found[PROJECTION] == math.fsum([0.5 / 25, 2 / 4]) / math.fsum([5 / 25, 1 / 4])
    assert found[LOGPROBS] == 1.0


def test_against_the_way_the_projection_is_negative():
    hybrid = Results((halves([3.0, 3.0]), halves([3.0]), halves([-2.0], [0.0])), A.logprobs)
    found = Measures(CALLS, ROWS, A, B).of(hybrid)
    assert found[PROJECTION] == -1.0
    assert found[OUTPUT] == 5 / 25 + 1 / 4
    assert found[LOGPROBS] == 0


def test_elements_that_differ_by_linear():
    assert Measures(CALLS, ROWS, A, B).differing() == {"up": (3, 2, 4), "down": (1, 1, 1)}
    signed = Results((halves([3.0, 4.0]), halves([2.0]), halves([-0.0], [0.0])), None)
    measures = Measures(CALLS, ROWS, A, signed)
    assert measures.differing() == {"up": (3, 1, 4), "down": (1, 0, 1)}  # -0 is other bits, and no distance
    assert measures.of(signed)[OUTPUT] == 0
    assert measures.of(signed)[PROJECTION] == 0.0


def test_outputs_in_float64_are_compared_as_they_are():
    """In A's units, a B of another checkpoint is no fp16 number."""
    wide = Results((A.outputs[0].double(), A.outputs[1].double() * 1.0001, A.outputs[2].double()), None)
    measures = Measures(CALLS, ROWS, A, wide)
    assert measures.differing() == {"up": (3, 0, 4), "down": (1, 1, 1)}
    assert measures.of(wide)[LAYER + "down"] == pytest.approx(1e-8, rel=1e-6)


def test_without_a_model_there_are_no_log_probabilities():
    a, b = (Results(r.outputs, None) for r in (A, B))
    assert LOGPROBS not in Measures(CALLS, ROWS, a, b).of(b)


def test_an_infinite_log_probability_that_moves_is_no_small_distance():
    moved = Results(B.outputs, torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert Measures(CALLS, ROWS, A, B).of(moved)[LOGPROBS] == math.inf


def test_summed_in_float64():
    """fp16 could hold neither the difference nor its square."""
    calls = (Call("w", halves([1.0])),)
    a, b = Results((halves([2048.0, 1.0]),), None), Results((halves([2050.0, 1.0009765625]),), None)
    assert Measures(calls, (), a, b).of(b)[OUTPUT] == (4 + 2**-20) / (2048**2 + 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("side", ["A", "B"])
def test_ends_that_are_not_finite_are_refused(side, value):
    broken = Results((A.outputs[0], halves([value]), A.outputs[2]), None)
    with pytest.raises(UnsupportedError, match=f"^{side}'s output of down is not finite: its values leave the range"):
        Measures(CALLS, ROWS, *((broken, B) if side == "A" else (A, broken)))


def test_zero_is_no_measure():
    zero = Results((A.outputs[0], halves([0.0]), A.outputs[2]), None)
    with pytest.raises(
        UnsupportedError, match=r"^A's output of down is zero throughout, so that no distance is relative to it"
    ):
        Measures(CALLS, ROWS, zero, B)
    assert Measures(CALLS, ROWS, B, zero).of(zero)[LAYER + "down"] == 1.0  # B's may be
