"""Draw ``curve.png`` from a folder's ``training.json``: ``python training/curve.py DIR`` (train.py does it where it can)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def plot(folder: Path) -> None:
    """Write ``folder/curve.png``, or say that matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no curve.png; draw it elsewhere with training/curve.py")
        return
    record = json.loads((folder / "training.json").read_text())
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    millions = [p["tokens"] / 1e6 for p in record["curve"]]
    axes.plot(millions, [p["train_loss"] for p in record["curve"]], label="train (with dropout)")
    axes.plot(millions, [p["valid_loss"] for p in record["curve"]], label="validation")
    axes.axhline(record["unigram"]["loss_per_token"], linestyle=":", color="gray", label="unigram, held-out")
    axes.set(xlabel="million tokens seen", ylabel="nats per token")
    axes.legend()
    figure.savefig(folder / "curve.png.partial", dpi=120, format="png")
    os.replace(folder / "curve.png.partial", folder / "curve.png")


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
