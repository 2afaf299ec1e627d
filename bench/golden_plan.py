"""The problems of the golden recording: small ones that together exercise every part of every recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle

from bench.problems import Trial

EVERY = ("vllm.", "triton.")
MARLIN = ("vllm.marlin.",)
MACHETE = ("vllm.machete.",)
EXLLAMA = ("vllm.gptq_gemm",)
STORED = 1 << 12
"""About so many outputs of a record are stored; the digest is of all."""


@dataclass(frozen=True)
class Planned:
    """A trial and the kernels that it is recorded for: those whose name begins with one of ``kernels``."""

    trial: Trial
    kernels: tuple[str, ...]
    why: str
    """What it is there for."""

    @property
    def stride(self) -> int:
        """Every so-many-th column is stored, an odd number: so the columns stored walk through every place of a tile."""
        return 1 + self.trial.M * self.trial.N // STORED // 2 * 2


GROUPS = (128, 32, 64, -1)
KINDS = (("fp16", "awq"), ("bf16", "gptq"), ("fp16", "act_order"), ("bf16", "awq"), ("fp16", "gptq"), ("bf16", "act_order"))


class _Planner:
    """Deals groups, dtypes and forms in turn, so that each block of problems sees all of them."""

    def __init__(self) -> None:
        self.seeds = count(5000, 10)
        self.kinds = cycle(KINDS)
        self.groups = cycle(GROUPS)

    def weight(
        self,
        k: int,
        n: int,
        tokens: tuple[int, ...],
        kernels: tuple[str, ...],
        why: str,
        *,
        values: str = "plain",
        group: int | None = None,
        kind: tuple[str, str] | None = None,
        bias: bool = False,
    ) -> Iterator[Planned]:
        """One weight on several numbers of tokens; what is not named is dealt."""
        size = group or next(self.groups)
        dtype, form = kind or next(self.kinds)
        if form == "act_order" and size in (-1, k):
            form = "gptq"
        seed = next(self.seeds)
        for m in tokens:
            yield Planned(Trial(m, k, n, size, dtype, form, values, seed, bias), kernels, why)


def plan() -> list[Planned]:
    """All problems, deterministic."""
    p = _Planner()
    return [
        *_small(p),
        *_marlin_tiles(p),
        *_marlin_stripes(p),
        *_marlin_launches(p),
        *_marlin_bias(p),
        *_machete(p),
        *_exllama(p),
        *_exponents(p),
        *_cancelling(p),
    ]


def _small(p: _Planner) -> Iterator[Planned]:
    """Every kernel on small layers."""
    shapes = ((128, 128), (256, 128), (256, 256), (384, 128), (512, 128), (640, 256), (1024, 128), (1152, 128), (2048, 64))
    tokens = cycle(((1, 16), (7, 33), (2, 50), (9, 17), (4, 24)))
    for k, n in shapes:
        for values in ("plain", "wide"):
            yield from p.weight(k, n, next(tokens), EVERY, "small layers", values=values, kind=("fp16", "awq"))
            yield from p.weight(k, n, next(tokens), EVERY, "small layers", values=values)
    for group in GROUPS:
        yield from p.weight(256, 256, (3, 16), EVERY, "each group", values="wide", group=group, kind=("fp16", "awq"))


def _marlin_tiles(p: _Planner) -> Iterator[Planned]:
    """Each of Marlin's tiles under each group, and each number of rows that a tile has."""
    for tokens, n in (((1, 9), 4352), ((17,), 8704), ((33,), 4480)):
        for i, group in enumerate(GROUPS):
            kind = (("fp16", "bf16")[i % 2], ("awq", "gptq", "act_order", "gptq")[i])
            yield from p.weight(128 if i % 2 else 256, n, tokens, MARLIN, "Marlin's tiles", group=group, kind=kind)
    for m in (8, 12, 16, 20, 32, 40, 48, 49, 57, 64):
        yield from p.weight(256, 64, (m,), MARLIN, "Marlin's rows in a tile", values="wide")
    yield from p.weight(128, 8704, (49,), MARLIN, "Marlin's rows in a tile", kind=("fp16", "awq"))
    yield from p.weight(128, 4096, (6,), MARLIN, "tiles that another number of SMs changes", kind=("bf16", "gptq"))
    yield from p.weight(256, 3840, (16,), MARLIN, "tiles that another number of SMs changes", kind=("fp16", "awq"))


def _marlin_stripes(p: _Planner) -> Iterator[Planned]:
    """Output tiles cut into two, three and more pieces; whole tiles before them."""
    for k, n, m in ((512, 4352, 1), (384, 4352, 5), (768, 4480, 17), (512, 8704, 18), (256, 320, 3), (640, 64, 8)):
        for kind in (("fp16", "awq"), ("bf16", "gptq")):
            yield from p.weight(k, n, (m,), MARLIN, "stripes", kind=kind)
    for k, n, m in ((384, 192, 16), (1024, 64, 2), (1024, 128, 40), (2048, 64, 33), (1536, 192, 64), (4096, 64, 12)):
        yield from p.weight(k, n, (m,), MARLIN, "stripes", values="wide")
    for k, n, m in ((256, 23040, 1), (384, 23040, 2), (256, 23040, 1), (256, 23168, 1), (128, 23168, 17)):
        yield from p.weight(k, n, (m,), MARLIN, "whole tiles before stripes")


def _marlin_launches(p: _Planner) -> Iterator[Planned]:
    """More than 64 rows: whole blocks of 64 first, the rest in a launch of its own."""
    shapes = cycle(((128, 64), (256, 128), (512, 64), (128, 192), (384, 64)))
    for m in (65, 72, 80, 100, 111, 127, 128, 129, 145, 193, 255, 256, 300):
        k, n = next(shapes)
        yield from p.weight(k, n, (m,), MARLIN, "several launches", values="wide" if m % 2 else "plain")
    yield from p.weight(256, 2304, (256,), MARLIN, "row tiles beside each other", kind=("fp16", "gptq"))


def _marlin_bias(p: _Planner) -> Iterator[Planned]:
    """A bias inside the call: grouped, and behind whole-column scales, where the compiler fuses it."""
    for group in (-1, 128, -1, 32, -1, 64):
        for kind in (("fp16", "awq"), ("bf16", "gptq")):
            yield from p.weight(256, 128, (1, 12, 70), MARLIN, "bias", group=group, kind=kind, bias=True)
    yield from p.weight(512, 4352, (2,), MARLIN, "bias", group=-1, kind=("fp16", "gptq"), bias=True)


def _machete(p: _Planner) -> Iterator[Planned]:
    """Each of Machete's small tiles, with sums cut along K."""
    groups = cycle((128, 64, -1))
    for k, n, tokens in (
        *((1024, 128, (1, 40)), (2048, 128, (17, 65)), (4096, 128, (16, 130)), (1536, 384, (8, 257)), (3072, 256, (33, 70))),
        *((1088, 128, (5, 20)), (6272, 128, (3, 48)), (4160, 128, (100, 12))),
    ):
        for kind in (("fp16", "awq"), ("bf16", "gptq")):
            group = next(groups)
            yield from p.weight(k, n, tokens, MACHETE, "Machete's pieces", group=64 if k % group else group, kind=kind)
    for k, n, m, dtype in ((2048, 256, 30, "bf16"), (1536, 128, 6, "fp16"), (512, 128, 70, "fp16")):
        yield from p.weight(k, n, (m,), MACHETE, "Machete's pieces", group=64, kind=(dtype, "act_order"), values="wide")


def _exllama(p: _Planner) -> Iterator[Planned]:
    """One block or two, whose sum is determined, and more, whose order is not."""
    for k, m in ((128, 1), (128, 50), (256, 8), (256, 13), (256, 47), (384, 3), (512, 16), (768, 9), (1024, 2)):
        for form in ("gptq", "act_order"):
            yield from p.weight(k, 128, (m,), EXLLAMA, "ExLlama's blocks", group=64, kind=("fp16", form), values="wide")


def _exponents(p: _Planner) -> Iterator[Planned]:
    """Activations and scales over the whole range of their dtype."""
    but_exllama = ("vllm.marlin.", "vllm.awq", "vllm.machete.", "triton.")
    for i, (k, n) in enumerate(((128, 128), (256, 128), (512, 128), (384, 64), (1024, 128), (256, 256))):
        for dtype, form in (("fp16", ("awq", "gptq")[i % 2]), ("bf16", ("gptq", "awq")[i % 2])):
            yield from p.weight(k, n, (16,), EVERY, "whole exponent range", values="wild", kind=(dtype, form))
            yield from p.weight(k, n, (8,), but_exllama, "infinities and NaN", values="special", kind=(dtype, form))
    for k, n, group in ((256, 128, -1), (512, 64, 64), (1024, 128, 32), (2048, 64, 32)):
        yield from p.weight(k, n, (24,), EVERY, "whole exponent range", values="wild", kind=("fp16", "awq"), group=group)
    yield from p.weight(256, 128, (24,), MARLIN, "whole exponent range", values="wild", kind=("bf16", "gptq"), bias=True)


def _cancelling(p: _Planner) -> Iterator[Planned]:
    """Large terms that cancel: every order of summation shows."""
    for k, n, m in ((256, 128, 16), (512, 128, 12), (1024, 128, 20), (2048, 64, 8), (640, 256, 5)):
        yield from p.weight(k, n, (m,), EVERY, "order of summation", values="cancel", kind=("fp16", "awq"))
        yield from p.weight(k, n, (m,), EVERY, "order of summation", values="cancel", group=64)
    for k, n, m in ((3072, 128, 16), (4096, 128, 40), (6144, 128, 7)):
        for kind in (("fp16", "awq"), ("bf16", "gptq")):
            yield from p.weight(k, n, (m,), MACHETE, "order of summation", values="cancel", group=128, kind=kind)
    yield from p.weight(768, 4480, (3,), MARLIN, "order of summation", values="cancel")
    for m in (2, 16):
        yield from p.weight(256, 128, (m,), EXLLAMA, "order of summation", values="cancel", kind=("fp16", "gptq"))
