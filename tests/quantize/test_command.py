import json

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from qlab.checkpoint import read
from qlab.quantize.__main__ import main as quantize
from qlab.quantize.perplexity import main as measure

TEXT = "A scale is rounded once. A code is chosen for the rounded scale, and never before it is rounded. " * 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Llama directory with tokenizer, and a text beside it."""
    home = tmp_path_factory.mktemp("quantize")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(home / "model")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT)
    return home


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def call(home, out, *more, method="gptq", text="text.txt", model="model"):
    common = ("--method", method, "--model", home / model, "--out", out, "--group", 32)
    calibration = () if method == "rtn" else ("--text", home / text, "--length", 16, "--samples", 8)
    return run(quantize, *common, *calibration, *more)


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("awq", (), ("awq", False, False)),
        ("gptq", (), ("gptq", True, False)),
        ("gptq", ("--asymmetric", "--act-order", "--version", 2), ("gptq", False, True)),
        ("rtn", (), ("compressed-tensors", True, False)),
        ("rtn", ("--format", "awq", "--asymmetric"), ("awq", False, False)),
    ],
)
def test_it_writes_a_checkpoint_with_its_tokenizer(home, tmp_path, method, more, expected):
    result = call(home, tmp_path / "out", *more, method=method)
    assert result.exit_code == 0, result.output
    assert "7 linears" in result.output
    checkpoint = read(tmp_path / "out")
    w = checkpoint.weight("model.layers.0.mlp.up_proj")
    assert (checkpoint.method, w.symmetric, w.act_order) == expected
    assert (w.input_scale is not None) == (method == "awq")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (home / "model" / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    found = run(measure, "--model", tmp_path / "out", "--text", home / "text.txt", "--length", 16, "--train", home / "text.txt")
    assert found.exit_code == 0, found.output
    assert "perplexity" in found.output
    assert "unigram" in found.output


def test_bad_input_gets_one_sentence_and_status_2(home, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (home / "short.txt").write_text("too short")
    (home / "binary.txt").write_bytes(b"\xff\xfe\x00")
    cases = [
        (call(home, out, model="absent"), "absent holds no config.json"),
        (call(home, out, text="absent.txt"), "absent.txt"),
        (call(home, out, text="binary.txt"), "give a UTF-8 text file"),
        (call(home, out, text="short.txt"), "fewer than one row of 16"),
        (call(home, tmp_path / "empty"), "exists already"),
        (call(home, out, "--group", 48), "not a multiple of the group size 48"),
        (call(home, out, "--act-order", method="awq"), "--act-order belongs to --method gptq, not to awq"),
        (call(home, out, "--damping", 0.01, method="rtn"), "--damping belongs to --method gptq, not to rtn"),
        (call(home, out, "--no-clip"), "--no-clip belongs to --method awq, not to gptq"),
        (call(home, out, "--samples", 8, method="rtn"), "--samples belongs to methods that calibrate"),
        (call(home, out, "--version", 2, method="awq"), "--version belongs to the gptq layout, not to awq"),
        (call(home, out, "--version", 3), "--version is 1 or 2"),
        (call(home, out, "--samples", 0), "--samples must be 1 or more"),
        (call(home, out, "--damping", -1), "damping must be zero or positive"),
        (run(quantize, "--method", "awq", "--model", home / "model", "--out", out), "need --text FILE"),
        (run(measure, "--model", home / "absent", "--text", home / "text.txt"), "absent"),
    ]
    for result, sentence in cases:
        assert result.exit_code == 2, (sentence, result.output)
        assert sentence in result.output.replace("\n", " ")
        assert len(result.output.strip().splitlines()) == 1
    assert not out.exists()


def test_a_quantised_model_is_not_quantised_again(home, tmp_path):
    assert call(home, tmp_path / "first").exit_code == 0
    result = call(home, tmp_path / "second", model=tmp_path / "first")
    assert result.exit_code == 2
    assert "is quantised already" in result.output


def test_a_checkpoint_is_replaced_only_when_asked(home, tmp_path):
    assert call(home, tmp_path / "out").exit_code == 0
    before = read(tmp_path / "out").weight("model.layers.0.mlp.up_proj").digest()
    assert call(home, tmp_path / "out").exit_code == 2
    assert read(tmp_path / "out").weight("model.layers.0.mlp.up_proj").digest() == before
    assert call(home, tmp_path / "out", "--overwrite", "--asymmetric").exit_code == 0
    assert read(tmp_path / "out").weight("model.layers.0.mlp.up_proj").digest() != before
