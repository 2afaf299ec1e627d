"""Loss of a language model on a token stream, and of the unigram model it has to beat. Losses are nats per token."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

END_OF_TEXT = 0


@torch.no_grad()
def stream_loss(model: torch.nn.Module, tokens: Tensor, length: int, *, batch: int = 16, autocast: bool = False) -> float:
    """Mean loss over int64 ``tokens`` [T], cut into windows of ``length`` that share no context.

    Every token but the first is predicted once; end-of-text tokens are left out, since they stand for no text.
    """
    was_training = model.training
    model.eval()
    windows = [(tokens[i : i + length], tokens[i + 1 : i + 1 + length]) for i in range(0, len(tokens) - 1, length)]
    total, count = 0.0, 0
    while windows:
        group = [w for w in windows[:batch] if len(w[1]) == len(windows[0][1])]
        del windows[: len(group)]
        inputs = torch.stack([x[: len(y)] for x, y in group])
        targets = torch.stack([y for _, y in group])
        with torch.autocast(tokens.device.type, torch.bfloat16) if autocast else nullcontext():
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        keep = targets.flatten() != END_OF_TEXT
        total += losses[keep].double().sum().item()
        count += int(keep.sum())
    model.train(was_training)
    return total / count


def unigram_loss(train: np.ndarray, test: np.ndarray, vocabulary: int) -> float:
    """Mean loss on ``test`` of token frequencies counted in ``train`` (one added to each), without end-of-text tokens."""
    counts = np.bincount(train, minlength=vocabulary).astype(np.float64) + 1
    counts[END_OF_TEXT] = 0
    with np.errstate(divide="ignore"):
        log_probability = np.log(counts / counts.sum())
    text = test[1:]
    return float(-log_probability[text[text != END_OF_TEXT]].mean())


def summary(loss: float, tokens: np.ndarray, text_bytes: int) -> dict[str, float]:
    """Loss and perplexity per token and per byte; ``text_bytes`` is the size of the text that ``tokens`` encode."""
    per_byte = loss * int((tokens[1:] != END_OF_TEXT).sum()) / text_bytes
    return {
        "loss_per_token": loss,
        "perplexity_per_token": math.exp(loss),
        "loss_per_byte": per_byte,
        "bits_per_byte": per_byte / math.log(2),
        "perplexity_per_byte": math.exp(per_byte),
    }
