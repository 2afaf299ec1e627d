import math
from types import SimpleNamespace

import pytest
import torch

from qlab.errors import QlabError
from qlab.quantize.llama import install
from qlab.quantize.perplexity import dequantized, perplexity, unigram


class Bigram(torch.nn.Module):
    """p(next | t) is 0.7 for (t + 1) mod 4 and 0.1 for the other three."""

    def forward(self, input_ids, use_cache):
        p = torch.full((*input_ids.shape, 4), 0.1)
        p.scatter_(-1, ((input_ids + 1) % 4)[..., None], 0.7)
        return SimpleNamespace(logits=p.log() + 3.0)


def test_of_a_model_whose_probabilities_are_known():
    rows = torch.tensor([[0, 1, 2, 0], [3, 0, 1, 2], [1, 1, 1, 1]])  # five steps follow the rule, four do not
    found = perplexity(Bigram(), rows, batch=2)
    assert found.tokens == 9
    assert found.nats == pytest.approx(-(5 * math.log(0.7) + 4 * math.log(0.1)) / 9, rel=1e-6)
    assert found.value == pytest.approx(math.exp(found.nats))


def test_of_a_uniform_model_is_the_vocabulary(tiny):
    model = tiny()
    model.get_parameter("model.norm.weight").data.zero_()
    assert perplexity(model, torch.arange(64).reshape(2, 32)).value == pytest.approx(96.0, rel=1e-9)


def test_unigram_counts_with_one_added():
    train = torch.tensor([0, 0, 1])  # of a vocabulary of 3: probabilities 3/6, 2/6, 1/6
    rows = torch.tensor([[2, 0, 1], [0, 2, 2]])
    found = unigram(train, rows, 3)
    assert found.tokens == 4
    assert found.nats == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6) + 2 * math.log(1 / 6)) / 4)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_zero_biases_that_autogptq_adds_are_no_parameters(tiny, value):
    bias = {"model.layers.1.mlp.down_proj.bias": torch.full((64,), value)}
    if value:
        with pytest.raises(QlabError, match=r"no tensor model\.layers\.1\.mlp\.down_proj\.bias"):
            install(tiny(), {}, bias)
    else:
        install(tiny(), {}, bias)


def test_directories_that_are_no_model_are_named(tmp_path):
    with pytest.raises(QlabError, match=r"config\.json: the file is missing"):
        dequantized(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(QlabError, match=f"cannot load the model in {tmp_path}"):
        dequantized(tmp_path)
