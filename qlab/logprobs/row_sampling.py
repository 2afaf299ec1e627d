"""Which rows a verifier asks for, and what they cost.

The seed is drawn after the generator has committed to all rows. From there on everybody can compute the sample: sha256 in
counter mode, without replacement, every (linear, token) equally likely.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from qlab.engine.run import Tap
from qlab.errors import QlabError

PLACE = 24
"""Bytes of a row's place: linear 4, sequence 4, position 4, row 4, M 4, flags 4."""
DIGEST = 16
"""Bytes of an output row's digest, where it stands in for the row."""
ELEMENT = 2
"""Bytes of an fp16 or bf16 number."""


def choose_taps(seed: str, linears: Sequence[str], fed: Sequence[int], count: int) -> tuple[Tap, ...]:
    """``count`` places among ``linears`` times the tokens ``fed`` to each sequence, in the order drawn.

    ``seed`` is any text; with a commitment it begins with the root, so that it cannot have been known before. Raises QlabError
    where so many places do not exist.
    """
    ends = list(accumulate(fed))
    everywhere = len(linears) * (ends[-1] if ends else 0)
    if not 1 <= count <= everywhere:
        raise QlabError(f"{count} rows cannot be sampled from {everywhere}; ask for 1 to {max(everywhere, 1)}")
    chosen: dict[int, None] = {}
    for number in _numbers(seed, everywhere):
        chosen.setdefault(number)
        if len(chosen) == count:
            break
    taps = []
    for number in chosen:
        token, linear = divmod(number, len(linears))
        sequence = bisect_right(ends, token)
        taps.append(Tap(linears[linear], sequence, token - (ends[sequence] - fed[sequence])))
    return tuple(taps)


def place_index(tap: Tap, linears: Sequence[str], fed: Sequence[int]) -> int:
    """Number of a row among all: by sequence, then position, then linear. Raises QlabError for a place that is none."""
    if tap.linear not in linears or not 0 <= tap.sequence < len(fed) or not 0 <= tap.position < fed[tap.sequence]:
        raise QlabError(f"{tap.linear} at position {tap.position} of sequence {tap.sequence} is no row of this trace")
    return (sum(fed[: tap.sequence]) + tap.position) * len(linears) + list(linears).index(tap.linear)


def _numbers(seed: str, below: int) -> Iterator[int]:
    """Uniform numbers below ``below``, without end: words of 64 bits, those of the last, incomplete round left out."""
    most = (1 << 64) // below * below
    counter = 0
    while True:
        block = hashlib.sha256(b"qlab.rows.sample/1\0" + counter.to_bytes(8, "big") + seed.encode()).digest()
        counter += 1
        for i in range(0, len(block), 8):
            word = int.from_bytes(block[i : i + 8], "big")
            if word < most:
                yield word % below


@dataclass(frozen=True)
class Cost:
    """Bytes per fed token that sampled rows take, averaged over the linears that may be drawn."""

    rows: int
    tokens: int
    x: float
    y: float
    """The output row, or its digest."""
    place: float
    proof: float
    """Merkle proofs; 0 without a commitment."""

    @property
    def total(self) -> float:
        return self.x + self.y + self.place + self.proof


def cost(
    shapes: Mapping[str, tuple[int, int]], fed: Sequence[int], rows: int, *, whole: bool = True, committed: bool = True
) -> Cost:
    """What ``rows`` sampled rows cost; ``shapes`` holds (K, N) by linear, ``whole`` keeps y and not its digest."""
    tokens = sum(fed)
    x = ELEMENT * sum(k for k, _ in shapes.values()) / len(shapes)
    y = ELEMENT * sum(n for _, n in shapes.values()) / len(shapes) if whole else float(DIGEST)
    proof = 32.0 * math.ceil(math.log2(max(2, tokens * len(shapes)))) if committed else 0.0
    per = rows / tokens
    return Cost(rows, tokens, x * per, y * per, PLACE * per, proof * per)


def affordable(
    shapes: Mapping[str, tuple[int, int]],
    fed: Sequence[int],
    bytes_per_token: float,
    *,
    whole: bool = True,
    committed: bool = True,
) -> int:
    """Rows that fit into ``bytes_per_token`` on average. Raises QlabError where not one does."""
    one = cost(shapes, fed, 1, whole=whole, committed=committed).total
    rows = min(int(bytes_per_token / one), len(shapes) * sum(fed))
    if rows < 1:
        raise QlabError(f"{bytes_per_token:g} bytes per token are less than one row of {sum(fed)} tokens costs, {one:.1f}")
    return rows
