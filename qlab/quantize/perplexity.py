"""Held-out perplexity of a language model, and that of a unigram model to compare it with.

``python -m qlab.quantize.perplexity --model DIR --text FILE`` takes full-precision and INT4 directories alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from qlab.command import one_sentence
from qlab.quantize.llama import empty, install, load, tokenizer
from qlab.quantize.text import read_text, token_rows


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood per predicted token, in nats."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nats)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, *, batch: int = 8) -> Perplexity:
    """Of ``model`` on tokens int64 [R, T], each row on its own: its first token is context, the other T - 1 are predicted.

    The forward pass runs in the model's dtype, the log-probabilities and their sum in float64.
    """
    total = 0.0
    for part in rows.split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].double()
        log_p = torch.log_softmax(logits, -1).gather(-1, part[:, 1:, None])
        total -= float(log_p.sum())
    count = rows.shape[0] * (rows.shape[1] - 1)
    return Perplexity(total / count, count)


def unigram(train: Tensor, rows: Tensor, vocabulary: int) -> Perplexity:
    """Of the same predicted tokens under ``p(t) = (count(t) + 1) / (tokens + vocabulary)``, counted on ``train``."""
    counts = torch.bincount(train.reshape(-1), minlength=vocabulary).double() + 1
    log_p = (counts / counts.sum()).log()
    predicted = rows[:, 1:].reshape(-1)
    return Perplexity(-float(log_p[predicted].mean()), predicted.numel())


def dequantized(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Llama model of a full-precision or INT4 directory in ``dtype``; INT4 weights are dequantised without rounding.

    Raises QlabError (CheckpointError) naming the file for whatever keeps the directory from being one.
    """
    from qlab.checkpoint import quantised, read
    from qlab.checkpoint.files import read_json

    if not quantised(directory, read_json(directory, "config.json")):
        return load(directory, dtype)
    checkpoint = read(directory)
    model = empty(dict(checkpoint.hf_config), dtype)
    install(model, checkpoint.weights, {name: checkpoint.tensor(name) for name in checkpoint.others()}, complete=True)
    return model


@one_sentence("qlab.quantize.perplexity")
def main(
    model: Annotated[Path, typer.Option(help="Full-precision or INT4 directory, with its tokenizer.")],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.")],
    train: Annotated[Path | None, typer.Option(help="Text to count a unigram model on, for comparison.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per row; each row is predicted on its own.")] = 512,
) -> None:
    """Held-out perplexity of a model, computed in float32."""
    words = tokenizer(model)
    rows = token_rows(words, read_text(text), length)
    found = perplexity(dequantized(model), rows)
    typer.echo(f"{model}: perplexity {found.value:.4f} ({found.nats:.6f} nats per token, {found.tokens} tokens)")
    if train is not None:
        base = unigram(token_rows(words, read_text(train), length), rows, len(words))
        typer.echo(f"unigram: perplexity {base.value:.4f} ({base.nats:.6f} nats per token)")


if __name__ == "__main__":
    typer.run(main)
