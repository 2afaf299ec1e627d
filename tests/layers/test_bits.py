"""The walk, layer by layer, gives the built-in engine's bits: A's, B's and a hybrid's."""

from __future__ import annotations

import pytest
import torch

from qlab import data
from qlab.attribution.result import LOGPROBS, OUTPUT
from qlab.engine.attention import Placed
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request
from qlab.layers.walk import forward, swaps_of
from tests.attribution.subjects import explained, model
from tests.layers.conftest import CPU, IDS

PATHS = ("awq@a100", "awq_marlin@h100")


def step(engine):
    return engine.model.step(IDS, [Placed(0, 0, len(IDS), engine.model.cache(len(IDS)))])


def of_builtin(folder, path):
    return Builtin(folder, Path.parse(path), CPU)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_ends_and_every_hybrid(relative, opened, family):
    folder = relative(family)
    pair = opened(*PATHS, folder)
    swaps = swaps_of(pair, "linear")
    with torch.no_grad():
        walked = forward(pair, IDS, swaps, singles=True, seed=0)
        of = pair.a.blocks.logprobs
        a, b = (of_builtin(folder, path) for path in PATHS)
        assert torch.equal(of(walked.entered[-1]), step(a))
        assert torch.equal(of(walked.last_b), step(b))
        assert torch.equal(of(walked.last_b).float(), b.run(Request((IDS,), 1, top_k=0)).sequences[0].logprobs)
        own = {name: linear.run for name, linear in a.model.linears.items()}
        for j, swap in enumerate(swaps):  # one linear more from B each time
            name = f"model.layers.{swap.layer}.{swap.taps[0]}"
            linear = a.model.linears[name]
            linear.run = b.model.linears[name].run
            assert torch.equal(of(walked.nested[j]), step(a)), swap.name
            if j == 3:
                for other, run in own.items():
                    a.model.linears[other].run = run if other != name else linear.run
                assert torch.equal(of(walked.single[j]), step(a))
                for swap_before in swaps[:j]:
                    before = f"model.layers.{swap_before.layer}.{swap_before.taps[0]}"
                    a.model.linears[before].run = b.model.linears[before].run
    assert not torch.equal(of(walked.nested[0]), of(walked.entered[-1]))


def test_two_checkpoints(awq, gptq, opened):
    """Each end runs its own checkpoint alone: nothing is passed between the two."""
    pair = opened("awq_marlin@a100", "gptq_marlin@a100", awq, gptq)
    with torch.no_grad():
        walked = forward(pair, IDS, swaps_of(pair, "linear"), singles=False, seed=0)
        for hidden, folder, side in ((walked.entered[-1], awq, pair.a), (walked.last_b, gptq, pair.b)):
            assert torch.equal(side.blocks.logprobs(hidden), step(of_builtin(folder, str(side.path))))


def test_the_total_is_that_of_two_runs(awq, gptq, found):
    """At the ids that A's own run lists, from what the engine reports in float32."""
    r = found("awq_marlin@a100", "gptq_marlin@a100", awq, gptq)
    a = of_builtin(awq, "awq_marlin@a100").run(Request((IDS,), 1)).sequences[0]
    b = of_builtin(gptq, "gptq_marlin@a100").run(Request((IDS,), 1, wanted=(a.ids,))).sequences[0]
    assert not torch.equal(a.ids, b.ids[:, :5])
    rows = (b.logprobs[:, 5:] - a.logprobs).double().square().sum(-1)
    assert r.total_by_token == pytest.approx(rows.tolist(), rel=1e-4)
    assert r.total == pytest.approx(float(rows.sum()), rel=1e-4)


def test_atomics_follow_the_seed(opened):
    """The shipped model: the tiny one's K leaves atomics no order."""
    folder = data.model_directory("gptq")
    pair = opened("gptq@a100", "gptq_marlin@a100", folder)
    engine = of_builtin(folder, "gptq@a100")
    with torch.no_grad():
        found = {s: forward(pair, IDS, (), singles=False, seed=s) for s in (0, 3)}
        for seed, walked in found.items():
            with engine.model.watched(_Nothing(), seed):
                assert torch.equal(pair.a.blocks.logprobs(walked.entered[-1]), step(engine))
    assert not torch.equal(found[0].entered[-1], found[3].entered[-1])


class _Nothing:
    def enter(self, linear, x):
        return x

    def leave(self, linear, x, y):
        pass


@pytest.mark.parametrize("b", ["awq_marlin@h100", "gptq_marlin@a100"])
def test_explain_finds_the_same_divergence(awq, gptq, found, b):
    """Two programs on the same tokens: final log-probabilities, and each linear's outputs on A's inputs."""
    other = awq if b.startswith("awq") else gptq
    mine = found("awq@h100", b, awq, other, singles=False)
    subject, weights = model("awq@h100", b, awq, other, prompts=((*IDS, 3),), forced=1)
    theirs = explained(subject, "awq@h100", b, weights)
    assert theirs.measure(LOGPROBS).total == pytest.approx(mine.total, rel=1e-3)
    estimated = 1e-2 if other == gptq else 1e-9  # input scales are not kept beside these weights
    assert theirs.measure(OUTPUT).total == pytest.approx(sum(x.local**2 for x in mine.linears), rel=estimated)
