"""A part of a request draws what the whole would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.data import model_directory
from qlab.engine.builtin import Builtin
from qlab.engine.flip import Flip
from qlab.engine.path import Path
from qlab.engine.run import Request, Sampling


@pytest.mark.parametrize("flip", [None, Flip(0.05, 3)])
def test_a_part_draws_as_the_whole(flip: Flip | None) -> None:
    engine = Builtin(model_directory("awq"), Path("awq_marlin", "h100"), torch.device("cpu"), flip=flip)
    same = tuple(range(7, 19))
    whole = Request((same, same), 6, sampling=Sampling(1.0, 5))
    first, second = engine.run(whole).sequences
    alone = engine.run(replace(whole, prompts=(same,), first=1)).sequences[0]
    assert torch.equal(alone.tokens, second.tokens)
    assert torch.equal(alone.logprobs, second.logprobs)
    assert not torch.equal(first.tokens, second.tokens)
