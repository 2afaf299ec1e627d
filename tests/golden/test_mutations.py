"""Deliberate errors in recipes against recorded outputs: every one is caught, or is proved to change no bit."""

from __future__ import annotations

import pytest

from qlab.hardware import gpu
from qlab.replay import missing
from tests.golden.mutations import FAMILIES, MUTATIONS, Tally, ground_truth, show, tally
from tests.golden.truth import GOLDEN

ENOUGH = 3

pytestmark = [
    pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}"),
    pytest.mark.skipif(
        not (GOLDEN / "golden.json").exists(),
        reason="tests/golden/golden.json is not recorded yet: python -m bench.record_golden on a GPU",
    ),
]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Tally]:
    result = tally(ground_truth(GOLDEN), ENOUGH)
    show(result)
    return result


def mutations(equivalent: bool) -> list[str]:
    return [m.name for m in MUTATIONS if bool(m.equivalent) == equivalent]


@pytest.mark.parametrize("name", mutations(False))
def test_an_error_is_caught_in_every_family_that_it_is_possible_in(found: dict[tuple[str, str], Tally], name: str) -> None:
    tallies = {family: found[name, family] for family in FAMILIES if found[name, family].tried}
    assert tallies, f"no recorded problem can show: {name}"
    missed = [family for family, t in tallies.items() if not t.caught]
    assert not missed, f"{name}: no recorded problem of {missed} catches it"


@pytest.mark.parametrize("name", mutations(True))
def test_an_error_that_is_proved_to_change_nothing_changes_nothing(found: dict[tuple[str, str], Tally], name: str) -> None:
    for family in FAMILIES:
        t = found[name, family]
        assert t.caught == 0, f"{name} is not equivalent: {t.first}"


def test_the_proof_about_zero_exponents_holds_for_every_gpu() -> None:
    """The smallest exponent of a nonzero term with fp16 inputs, -28 - F, lies above the e_zero of the mutation."""
    for key in ("v100", "a100", "h100", "b200"):
        step = gpu(key).step
        assert step.zero_exponent + 64 < -28 - step.fraction_bits
