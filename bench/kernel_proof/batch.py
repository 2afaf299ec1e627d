"""``cuda.batch_invariant``: a row's bits, whoever shares the batch, are those of the row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.kernel_proof.inputs import Trial, activations, weight
from bench.kernel_proof.place import Place
from bench.kernel_proof.tally import Tally
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.recipes import recipe
from qlab.replay import replay

NAME = "cuda.batch_invariant"
ROWS = 1024
REPLAYED = 48
"""Rows alone that are held against their replay."""
LAYERS = (
    Trial(ROWS, 4096, 1024, 128, "fp16", "awq", "cancel", 900),
    Trial(ROWS, 4096, 6144, 128, "bf16", "gptq", "plain", 901),
    Trial(ROWS, 2048, 1024, 64, "fp16", "act_order", "cancel", 902),
    Trial(ROWS, 1024, 4608, 32, "bf16", "awq", "cancel", 903),
    Trial(ROWS, 4096, 4096, 128, "fp16", "awq", "plain", 904),
    Trial(ROWS, 4096, 512, -1, "fp16", "awq", "cancel", 905),
    Trial(ROWS, 512, 11008, 128, "bf16", "act_order", "plain", 906),
    Trial(ROWS, 1152, 200, 32, "fp16", "awq", "wide", 907),
    Trial(ROWS, 3584, 4608, 64, "fp16", "gptq", "cancel", 908),
    Trial(ROWS, 416, 72, 32, "bf16", "gptq", "cancel", 909),
    Trial(ROWS, 8192, 1024, -1, "bf16", "gptq", "cancel", 910),
    Trial(ROWS, 14336, 4096, 128, "bf16", "awq", "plain", 911),
)
EDGES = (8, 16, 32, 48, 64, 80, 96, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024)


def batches(layer: int) -> list[int]:
    """Every M for the first layer; for others those up to 40, about every edge of a tile, and every 29th."""
    if layer == 0:
        return list(range(1, ROWS + 1))
    found = {*range(1, 41), *(m + d for m in EDGES for d in (-1, 0, 1)), *range(41 + layer, ROWS + 1, 29)}
    return sorted(m for m in found if m <= ROWS)


def poison(kind: int, dtype: torch.dtype) -> float:
    return (torch.nan, torch.finfo(dtype).max, torch.inf, -torch.finfo(dtype).max)[kind % 4]


def prove(place: Place, tally: Tally, layers: tuple[Trial, ...] = LAYERS) -> None:
    kernel = place.kernel(NAME)
    tally.kernels[NAME] = kernel.version()
    for i, trial in enumerate(layers):
        share = 1.0 if i + 1 == len(layers) else 0.35 + 0.65 * (i + 1) / len(layers)
        if place.over(0.97):
            tally.skip("layers: no time left", len(layers) - i)
            return
        with tally.guard("a row alone is its replay", trial):
            w = weight(trial, place.device)
            packed, x = kernel.pack(w), activations(trial, place.device)
            alone = torch.cat([place.run(kernel, x[r : r + 1], packed) for r in range(len(x))])
            rows = torch.arange(0, len(x), max(1, len(x) // REPLAYED), device=place.device)
            said = recipe(NAME, Problem.of(w, len(rows)), place.gpu)
            tally.compare("a row alone is its replay", trial, alone[rows], replay(said, x[rows], w, engine=place.engine))
            _batches(place, tally, kernel, packed, (trial, i), x, alone, share)
    tally.complete = not tally.left_out


def _batches(
    place: Place,
    tally: Tally,
    kernel: Kernel,
    packed: Packed,
    which: tuple[Trial, int],
    x: Tensor,
    alone: Tensor,
    share: float,
) -> None:
    """Random rows in random order; half of them, but for every eighth M, are replaced by what must not show."""
    trial, layer = which
    todo = [m for m in batches(layer) if m <= len(x)]
    order = torch.randperm(len(todo), generator=torch.Generator().manual_seed(layer)).tolist()
    for done, m in enumerate(todo[i] for i in order):
        if place.over(share):
            tally.skip(f"{trial.K} x {trial.N}: no time left", len(todo) - done)
            return
        claim, problem = "a row in a batch is the row alone", trial.rows(m)
        with tally.guard(claim, problem):
            g = torch.Generator().manual_seed(10_000 * layer + m)
            rows = torch.randperm(len(x), generator=g)[:m]
            keep = torch.rand(m, generator=g) < 0.5
            keep[int(torch.randint(0, m, (1,), generator=g))] = True
            keep |= m % 8 == 3
            rows, keep = rows.to(place.device), keep.to(place.device)
            batch = x[rows]
            batch[~keep] = poison(m, x.dtype)
            tally.compare(claim, problem, place.run(kernel, batch, packed)[keep], alone[rows[keep]])
            tally.fact("rows that were NaN or huge beside them", int((~keep).sum()))
