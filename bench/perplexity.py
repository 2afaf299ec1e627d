"""Held-out perplexity of the shipped model in fp16, AWQ and GPTQ, beside round to nearest and a unigram model.

python -m bench.perplexity --json results/perplexity.json
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from qlab import data
from qlab.compare import digest
from qlab.environment import Environment, collect
from qlab.quantize import perplexity as measure
from qlab.quantize import rtn
from qlab.quantize.llama import tokenizer
from qlab.quantize.text import token_rows
from qlab.serial import write_json

SCHEMA = "qlab.perplexity/1"
LENGTH, GROUP = 512, 128


@dataclass(frozen=True)
class Entry:
    """One model: INT4 weights dequantised, run in float32, mean log-likelihood in float64."""

    model: str
    nats_per_token: float
    perplexity: float


@dataclass(frozen=True)
class Perplexities:
    schema: str
    environment: Environment
    text: str
    tokens: int
    """Predicted tokens."""
    tokens_digest: str
    entries: tuple[Entry, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    words = tokenizer(data.model_directory("fp16"))
    rows = token_rows(words, data.heldout_text(), LENGTH)
    found = {}
    for kind in ("fp16", "awq", "gptq"):
        model = measure.dequantized(data.model_directory(kind))
        found[kind] = measure.perplexity(model, rows)
        if kind == "fp16":
            for name, symmetric in (("round to nearest, symmetric", True), ("round to nearest, asymmetric", False)):
                found[name] = measure.perplexity(rounded(measure.dequantized(data.model_directory("fp16")), symmetric), rows)
    train = token_rows(words, data.calibration_text(), LENGTH)
    found["unigram, counted on the calibration text"] = measure.unigram(train, rows, len(words))
    entries = tuple(Entry(name, p.nats, p.value) for name, p in found.items())
    result = Perplexities(SCHEMA, collect(), "qlab/data/text/heldout.txt", found["fp16"].tokens, digest(rows), entries)
    write_json(args.json, result)
    for e in entries:
        print(f"{e.model:45} {e.perplexity:9.3f}")


def rounded(model: torch.nn.Module, symmetric: bool) -> torch.nn.Module:
    """The model with every projection rounded to nearest, in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            w = rtn.quantize(module.weight.detach().t(), GROUP, symmetric, name=name)
            module.weight.data = w.dequantize(torch.float32).t().contiguous()
    return model


if __name__ == "__main__":
    main()
