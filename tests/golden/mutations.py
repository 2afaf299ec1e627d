"""Deliberate errors in recipes, as rewrites of their trees: each must give other bits than the real kernels somewhere.

    python -m tests.golden.mutations [--recording DIR] [--enough 3]

prints, for each family of kernels, how many recorded problems catch an error and on how many it was tried. An error that
nothing can catch is listed with the proof that it changes no bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.record_golden import load
from qlab.attribution import rewrites
from tests.golden import rewrites as wrong
from tests.golden.rewrites import Rewrite, of
from tests.golden.truth import GOLDEN, Evidence, golden, silicon


@dataclass(frozen=True)
class Mutation:
    name: str
    rewrite: Rewrite
    equivalent: str = ""
    """Why it changes no bit, for one that does not."""


MUTATIONS = (
    Mutation("F + 1", of(rewrites.fraction_bits(1))),
    Mutation("F - 1", of(rewrites.fraction_bits(-1))),
    Mutation("L halved", of(rewrites.terms(0.5))),
    Mutation("L doubled", of(rewrites.terms(2))),
    Mutation("accumulator fp16 for fp32 and back", of(rewrites.other_accumulator)),
    Mutation("e_zero + 64 where zeros can be the largest term", wrong.zero_exponent(64, True)),
    Mutation("steps of a chain from the last to the first", of(rewrites.blocks(lambda b: b[::-1]))),
    Mutation("last two steps of a chain swapped", of(rewrites.blocks(rewrites.swap_last_blocks))),
    Mutation("last two parts of a join swapped", of(rewrites.joins(rewrites.swap_last_two))),
    Mutation("joins in pairs", of(rewrites.joins(rewrites.pairs))),
    Mutation("joins in the activations' dtype for fp32", of(rewrites.join_type)),
    Mutation("rounding of partial sums dropped", of(rewrites.without_rounding)),
    Mutation("rounding of partial sums added", of(rewrites.with_rounding)),
    Mutation("whole-column scale before the sum", of(rewrites.scale_before)),
    Mutation("whole-column scale after the sum", wrong.scale_after),
    Mutation("ExLlama's scale before the dot", of(rewrites.scale_before_dot)),
    Mutation("output scale dropped", of(rewrites.unscaled)),
    Mutation("weights fused for rounded", wrong.weights("fused", "rounded")),
    Mutation("weights rounded for fused", wrong.weights("rounded", "fused")),
    Mutation("bias added for fused", of(rewrites.bias("added"))),
    Mutation("bias fused for added", of(rewrites.bias("fused"))),
    Mutation("108 SMs for 132", wrong.fewer_sms),
    Mutation("Marlin's reduction fp16 for fp32 and back", wrong.other_reduction),
    Mutation("pieces joined in the other order", wrong.top_to_bottom),
    Mutation("torch.sum in turn", wrong.sum_in_turn),
    Mutation("torch.sum in pairs", wrong.sum_in_pairs),
    Mutation("act-order rows natural for sorted and back", wrong.rows),
    Mutation(
        "e_zero + 64 with fp16 inputs and fp32 accumulators",
        wrong.zero_exponent(64, False),
        "A zero term counts only through its exponent e_zero, and only when that is the largest. fp16 products have exponents "
        "from -28 on. Every sum is a multiple of 2^(its largest exponent - F), hence of 2^(-28 - F), so a nonzero accumulator "
        "has an exponent of -28 - F or more: -53 with F = 25. With e_zero = -133 + 64 = -69 some nonzero term is larger, and "
        "a sum of zeros alone is +0 whatever e_zero is.",
    ),
    Mutation(
        "order of k within one fused sum",
        of(rewrites.trees(rewrites.within_one_sum)),
        "The truncated terms of a fused sum are added exactly, as integers, and each is truncated below the largest exponent "
        "of all, so their order cannot matter. The normal form sorts them: it is the same recipe.",
    ),
    Mutation(
        "weights fused for rounded with the zero point 8",
        wrong.fused_symmetric,
        "-8 * s is exact unless it overflows, so RN(q * s + RN(-8 * s)) is one rounding of (q - 8) * s, as is "
        "RN((q - 8) * s). Tried where 8 * s is finite.",
    ),
)


FAMILIES = {
    "marlin": "vllm.marlin.",
    "machete": "vllm.machete.",
    "awq_gemm": "vllm.awq_gemm",
    "ExLlama": "vllm.gptq_gemm",
    "awq_triton": "vllm.awq_triton",
    "triton": "triton.",
}
"""Families of kernels, by how their names begin."""


@dataclass
class Tally:
    """On how many problems an error was tried in one family, and how many of those caught it."""

    tried: int = 0
    caught: int = 0
    first: str = ""
    """The first that did."""


def tally(evidence: Iterable[Evidence], enough: int | None = None) -> dict[tuple[str, str], Tally]:
    """(mutation, family) of every mutation on every ordered record; equal recipes for one problem count once.

    One that ``enough`` problems have caught is tried no more, nor, after 20 times as many, one that none can catch.
    """
    found = {(m.name, family): Tally() for m in MUTATIONS for family in FAMILIES}
    known: set[tuple[str, str, str]] = set()
    for e in evidence:
        family = next(f for f, start in FAMILIES.items() if e.kernel.startswith(start))
        key = (family, e.name, e.recipe.hash)
        if not e.recipe.ordered or key in known:
            continue
        known.add(key)
        for m in MUTATIONS:
            t = found[m.name, family]
            if enough is not None and (t.caught >= enough or (m.equivalent and t.tried >= 20 * enough)):
                continue
            wrong = m.rewrite(e)
            if wrong is None or not wrong.ordered:
                continue
            t.tried += 1
            if e.fault(wrong):
                t.caught += 1
                t.first = t.first or f"{e.kernel} on {e.name}"
    return found


def ground_truth(folder: Path, most: int = 1 << 23) -> Iterator[Evidence]:
    """A golden recording, or a large one, in ``folder``; problems of at most ``most`` products."""
    found = golden(*load(folder)) if (folder / "golden.json").exists() else silicon(folder, 300_000)
    return (e for e in found if e.products <= most)


def show(found: dict[tuple[str, str], Tally]) -> None:
    """Caught of tried, by error and family."""
    table = Table("error in the recipe", *FAMILIES, box=box.SIMPLE_HEAD)
    for m in MUTATIONS:
        cells = [found[m.name, family] for family in FAMILIES]
        table.add_row(m.name, *(f"{t.caught} of {t.tried}" if t.tried else "" for t in cells))
    Console(width=150).print(table)
    for m in MUTATIONS:
        if m.equivalent:
            print(f"{m.name}: changes no bit. {m.equivalent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, default=GOLDEN, help="folder with golden.json or silicon.json")
    parser.add_argument("--enough", type=int, help="try an error in a family until so many problems have caught it")
    options = parser.parse_args()
    show(tally(ground_truth(options.recording), options.enough))


if __name__ == "__main__":
    main()
