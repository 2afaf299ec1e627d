"""Real kernels handed to the tool: what needs no GPU."""

from __future__ import annotations

import pytest
import torch

from bench import planted_native
from qlab import hardware
from qlab.errors import UnsupportedError
from qlab.inputs import random_weight
from qlab.lab.faults import hypotheses


def test_every_wrong_packing_is_one_that_the_lab_knows():
    names = {name for name, _ in hypotheses(random_weight(planted_native.K, planted_native.N, planted_native.GROUP))}
    assert set(planted_native.STORED) <= names


def test_every_kernel_is_asked_clean_elsewhere_and_wrongly_packed():
    weight = random_weight(planted_native.K, planted_native.N, planted_native.GROUP)
    asked = list(planted_native.questions(weight, hardware.gpu("h100")))
    kernels, packings = len(planted_native.KERNELS), len(planted_native.STORED)
    assert len(asked) == kernels * (1 + packings) + (kernels - 1) + 1  # Machete runs on Hopper alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_ask():
    with pytest.raises(UnsupportedError, match="need a GPU"):
        planted_native.run()
