"""The model and texts that travel with the package: sizes, tokenizer, and that it models its language."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qlab.data
from qlab.data import calibration_text, heldout_text, model_directory
from qlab.errors import CheckpointError, QlabError

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 3 * 1024 + 1


@pytest.fixture(scope="module")
def folder():
    try:
        return model_directory("fp16")
    except CheckpointError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def heldout_loss(model, ids):
    """Nats per token over windows of 1,024 tokens that share no context."""
    windows = torch.tensor(ids[:-1]).reshape(-1, 1024)
    targets = torch.tensor(ids[1:]).reshape(-1, 1024)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def test_texts_are_long_and_do_not_overlap():
    heldout, calibration = heldout_text(), calibration_text()
    assert 60_000 <= len(heldout.encode()) <= 100_000
    assert 150_000 <= len(calibration.encode()) <= 250_000
    long = {p for p in heldout.split("\n\n") if len(p) >= 60}
    assert len(long) > 100
    assert not long & set(calibration.split("\n\n"))


def test_unknown_model_and_missing_files_give_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="'int3'; choose one of fp16, awq, gptq"):
        model_directory("int3")
    monkeypatch.setattr(qlab.data, "_HERE", tmp_path)
    with pytest.raises(CheckpointError, match="lacks the shipped awq model"):
        model_directory("awq")
    with pytest.raises(QlabError, match=r"heldout\.txt is missing"):
        heldout_text()


def test_sizes(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (512, 1024, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 64)
    assert config.num_hidden_layers == 3
    assert config.tie_word_embeddings


def test_weights_are_fp16_finite_and_trained(folder):
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 2048 * 512 + 3 * (2 * 512 * (512 + 256) + 3 * 512 * 1024 + 1024) + 512
    for name, t in tensors.items():
        assert t.dtype == torch.float16, name
        assert torch.isfinite(t).all(), name
        assert t.float().std() > 0, name


def test_tokenizer_returns_every_text(folder, tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for text in (heldout_text()[:20_000], "  naïve \t\n\n\r\n«Ω» 日本語 \U0001f40d\x00 end  "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0
        assert max(ids) < 2048
        assert tokenizer.decode(ids[1:]) == text


def test_loads_with_the_repository_root_first_on_the_path(folder):
    code = f"from transformers import AutoModelForCausalLM as A; print(A.from_pretrained({str(folder)!r}).num_parameters())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8_000_000


def test_heldout_perplexity_is_far_below_unigram(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(heldout_text())["input_ids"][:TOKENS]
    counts = np.bincount(tokenizer(calibration_text())["input_ids"][1:], minlength=2048) + 1.0
    unigram = -np.log(counts / counts.sum())[ids[1:]].mean()
    assert heldout_loss(model, ids) < unigram - 1.5
