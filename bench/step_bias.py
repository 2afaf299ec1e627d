"""Does a tensor core's step bias a long chain as its closed form says, and what do its two numbers move, F and L?

    python -m bench.step_bias --json results/attribution/step-bias.json
    python -m bench.step_bias --silicon --json results/h100/step-bias.json    # on a Hopper GPU

One chain of K = 4096 for each output, int4 weights in groups of 128 (normal ones, rounded to nearest; ``--weights uniform``
draws their codes), Gaussian activations, everything from seeds. Each fused sum of L products keeps F bits below its largest
exponent and is then cut to fp32's 24, toward zero: where the bits cut are random, an accumulator shrinks by
(1 - 2^-(F - 23)) / 2 of its last place each time, K / L times over the chain. So the ratio of two steps' losses is a prediction
without a free number, and so is each loss, given where the accumulator was along the chain. Products of bf16 have 16 bits, so
that often no bit is left to be cut, and the closed form is too large there.

Ampere has (F, L) = (24, 8) and Hopper (25, 16); of the two steps between them (25, 8) exists on silicon: on a Hopper GPU two
m16n8k8 in place of one m16n8k16 compute it. ``--silicon`` runs whole chains of either instruction and compares every
accumulator with its replay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.step_bias_tables import (
    SCHEMA,
    SILICON_SCHEMA,
    Interaction,
    Loss,
    Pair,
    Ratio,
    Result,
    Silicon,
    SiliconChain,
    markdown,
    silicon_markdown,
    verdict,
)
from bench.step_chains import (
    A100,
    DTYPES,
    F_ALONE,
    GROUP,
    H100,
    L_ALONE,
    STEPS,
    WEIGHTS,
    Data,
    K,
    Way,
    accumulators,
    closed_form,
    loss,
    on_silicon,
    predicted_loss,
)
from qlab.environment import collect
from qlab.errors import QlabError
from qlab.hardware import HOPPER, Step, detect
from qlab.logprobs.statistics import bootstrap
from qlab.replay import probe
from qlab.serial import write_json

SEEDS, FOLLOWED = 64, 8
"""Data sets of 2,048 outputs, and how many of them are followed along the chain."""
SILICON_SEEDS, SILICON_ROWS, SILICON_COLUMNS = 16, 64, 512
"""On a GPU: data sets of 32,768 outputs."""
RATIOS: tuple[tuple[str, str, str, str, float], ...] = (
    ("fp16", A100, H100, "H100 over A100", 0.746),
    ("fp16", A100, F_ALONE, "F alone, 24 to 25", 1.47),
    ("fp16", A100, L_ALONE, "L alone, 8 to 16", 0.51),
    ("fp16", F_ALONE, H100, "L alone, 8 to 16, at F = 25", float("nan")),
    ("bf16", A100, H100, "H100 over A100", 0.93),
)
"""dtype, two steps, words, and the ratio of losses that an earlier simulation of one data set gave (NaN: none)."""
PAIRS: tuple[tuple[str, str, Way, Way, float, float], ...] = (
    ("fp16", "A100 and H100", Way(A100), Way(H100), 0.986, 0.0088),
    ("fp16", "F alone (24 to 25, L = 8)", Way(A100), Way(F_ALONE), 0.994, 0.0122),
    ("fp16", "L alone (8 to 16, F = 24)", Way(A100), Way(L_ALONE), 0.997, 0.0142),
    ("fp16", "H100: one chain and 4-way split-K", Way(H100), Way(H100, 4), 0.995, 0.0171),
    ("fp16", "A100 and H100, both 4-way split-K", Way(A100, 4), Way(H100, 4), 0.952, 0.0034),
    ("fp16", "A100: k as 0, 8, 1, 9, ... inside each 16", Way(A100), Way(A100, permuted=True), 0.939, 0.0024),
    ("fp16", "H100: the same permutation", Way(H100), Way(H100, permuted=True), 0.0, 0.0),
    ("bf16", "A100 and H100", Way(A100), Way(H100), 0.898, 0.0),
)
"""dtype, words, the two ways, and the shares of accumulators and of outputs that differ in an earlier simulation."""


def _ratio(dtype: str, what: str, steps: tuple[Step, Step], earlier: float, losses: Sequence[Sequence[float]]) -> Ratio:
    """``losses`` [data sets] of the first step and of the second, which stands above."""
    predicted = closed_form(steps[1]) / closed_form(steps[0])
    found = bootstrap(lambda v: v[1].sum(-1) / v[0].sum(-1), np.array(losses))
    return Ratio(dtype, what, predicted, earlier, found.value, found.low, found.high)


class Tally:
    """What the data sets of one dtype add up to."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.outputs, self.norm = dtype, 0, 0.0
        self.pairs = [(what, a, b, earlier) for d, what, a, b, *earlier in PAIRS if d == dtype]
        self.ways = {Way(step) for step in STEPS} | {way for _, a, b, _ in self.pairs for way in (a, b)}
        self.lost: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
        self.predicted = dict.fromkeys(STEPS, 0.0)
        self.squares = dict.fromkeys(STEPS, 0.0)
        self.apart = dict.fromkeys(STEPS, 0)
        self.counts = np.zeros((len(self.pairs), 2), np.int64)

    def add(self, data: Data, followed: bool) -> None:
        y = {way: accumulators(data, way) for way in self.ways}
        wide = {way: v.view(np.float32).astype(np.float64) for way, v in y.items()}
        out = {way: torch.from_numpy(v.view(np.float32)).to(DTYPES[self.dtype]) for way, v in y.items()}
        for i, (_, a, b, _) in enumerate(self.pairs):
            self.counts[i] += (y[a] != y[b]).sum(), int((out[a] != out[b]).sum())
        for step, way in ((step, Way(step)) for step in STEPS):
            self.lost[step].append(loss(data, y[way]))
            self.predicted[step] += predicted_loss(data, STEPS[step]) if followed else 0.0
            self.squares[step] += float(np.square(wide[way] - wide[Way(A100)]).sum())
            self.apart[step] += int((out[way] != out[Way(A100)]).sum())
        self.outputs += data.exact.size
        self.norm += float(np.square(data.exact).sum())

    def losses(self, followed: int) -> Iterator[Loss]:
        for step, parts in self.lost.items():
            found = bootstrap(lambda v: v[0].sum(-1) / v[1].sum(-1), np.array(parts).T)
            lost, size = np.array(parts[:followed]).sum(0).tolist()
            own = STEPS[step]
            yield Loss(
                *(self.dtype, step, own.fraction_bits, own.terms, found.value, found.low, found.high),
                *(self.predicted[step] / size, lost / size),
            )

    def ratios(self) -> Iterator[Ratio]:
        for dtype, a, b, what, earlier in RATIOS:
            if dtype == self.dtype:
                lost = [[v for v, _ in self.lost[step]] for step in (a, b)]
                yield _ratio(dtype, what, (STEPS[a], STEPS[b]), earlier, lost)

    def found(self) -> Iterator[Pair]:
        for (what, _, _, earlier), (accumulated, out) in zip(self.pairs, self.counts.tolist(), strict=True):
            yield Pair(self.dtype, what, self.outputs, accumulated, out, tuple(earlier))

    def interactions(self) -> Iterator[Interaction]:
        shift = {step: np.array(parts).sum(0).tolist() for step, parts in self.lost.items()}
        loss_of = {step: lost / size for step, (lost, size) in shift.items()}
        of = f"of the {self.dtype}"
        yield _interaction(f"squared L2 {of} accumulators, relative", {s: v / self.norm for s, v in self.squares.items()})
        yield _interaction(f"share {of} outputs that differ", {s: v / self.outputs for s, v in self.apart.items()})
        yield _interaction(f"loss {of} accumulators, signed", {s: v - loss_of[A100] for s, v in loss_of.items()})


def _interaction(what: str, v: dict[str, float]) -> Interaction:
    f, terms, both = v[F_ALONE], v[L_ALONE], v[H100]
    rest = both - f - terms
    return Interaction(what, f, terms, both, rest, f + rest / 2, terms + rest / 2)


def measure(seeds: int = SEEDS, weights: str = "normal", followed: int = FOLLOWED, **sizes: int) -> Result:
    """Every loss, ratio, pair and interaction, by replay; ``sizes`` are those of :meth:`Data.make`."""
    tallies = [Tally(dtype) for dtype in DTYPES]
    for tally in tallies:
        for seed in range(seeds):
            tally.add(Data.make(seed, tally.dtype, weights, **sizes), seed < followed)
    return Result(
        *(SCHEMA, collect(), sizes.get("k", K), GROUP, weights, seeds, tallies[0].outputs),
        losses=tuple(v for t in tallies for v in t.losses(followed)),
        ratios=tuple(v for t in tallies for v in t.ratios()),
        pairs=tuple(v for t in tallies for v in t.found()),
        interactions=tuple(tallies[0].interactions()),
    )


def prove(
    seeds: int, weights: str = "normal", mma: Callable[..., Tensor] = probe.mma, device: str = "cuda", **sizes: int
) -> tuple[tuple[SiliconChain, ...], tuple[Ratio, ...]]:
    """Chains of m16n8k8 and of m16n8k16 on a Hopper GPU, both dtypes, against their replays, and the ratio of their losses."""
    instructions: dict[probe.Shape, str] = {"m16n8k8": F_ALONE, "m16n8k16": H100}
    chains, ratios = [], []
    for dtype in DTYPES:
        wrong = dict.fromkeys(instructions, 0)
        lost: dict[str, list[tuple[float, float]]] = {instruction: [] for instruction in instructions}
        outputs = 0
        for seed in range(seeds):
            data = Data.make(seed, dtype, weights, **sizes)
            outputs += data.exact.size
            for instruction, name in instructions.items():
                y = on_silicon(data, instruction, mma, device)
                wrong[instruction] += int((y != accumulators(data, Way(name))).sum())
                lost[instruction].append(loss(data, y))
        for instruction, name in instructions.items():
            step, (short, size) = STEPS[name], np.array(lost[instruction]).sum(0).tolist()
            mismatches = wrong[instruction]
            chains.append(SiliconChain(dtype, instruction, step.fraction_bits, step.terms, outputs, mismatches, short / size))
        what = "m16n8k16 over m16n8k8: L alone, 8 to 16, at F = 25"
        both = [[v for v, _ in parts] for parts in lost.values()]
        ratios.append(_ratio(dtype, what, (STEPS[F_ALONE], HOPPER), float("nan"), both))
    return tuple(chains), tuple(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--seeds", type=int, help=f"data sets, {SEEDS} or with --silicon {SILICON_SEEDS} by default")
    parser.add_argument("--weights", choices=WEIGHTS, default="normal")
    parser.add_argument("--silicon", action="store_true", help="run the chains on this machine's Hopper GPU")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds} must be at least 1")
    result: Any
    bad = 0
    try:
        if args.silicon:
            here = detect()
            if here is None or here.step != HOPPER:
                parser.error(f"--silicon needs a GPU with Hopper's step, and this machine has {here.name if here else 'none'}")
            seeds = args.seeds or SILICON_SEEDS
            chains, ratios = prove(seeds, args.weights, m=SILICON_ROWS, n=SILICON_COLUMNS)
            result = Silicon(SILICON_SCHEMA, collect(), here.key, K, GROUP, args.weights, seeds, chains, ratios)
            bad = sum(c.mismatches for c in chains)
            print(f"{verdict(result.ratios)}; {bad} accumulators differ from their replay.\n\n{silicon_markdown(result)}")
        else:
            result = measure(args.seeds or SEEDS, args.weights)
            print(f"{verdict(result.ratios)}.\n\n{markdown(result)}")
        if args.json:
            write_json(args.json, result)
    except QlabError as e:
        parser.error(str(e))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
