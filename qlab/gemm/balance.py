"""Pieces to thread blocks: runs of consecutive pieces, so that no thread block has much more of K than another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def runs(lengths: Sequence[int], blocks: int) -> list[tuple[int, int]]:
    """(first, behind the last) of at most ``blocks`` runs of consecutive pieces, the longest run as short as it can be.

    Marlin's stripes come out of its own pieces: every stripe but the last is as long as the others.
    """
    if not lengths:
        return []
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total, longest = int(ends[-1]), int(max(lengths))
    low, high = max(longest, -(-total // blocks)), total
    while low < high:
        middle = (low + high) // 2
        if len(_filled(ends, middle, blocks)) <= blocks:
            high = middle
        else:
            low = middle + 1
    return _filled(ends, low, blocks)


def _filled(ends: np.ndarray, most: int, blocks: int) -> list[tuple[int, int]]:
    """Runs of at most ``most`` rows, filled from the front; given up where they become more than ``blocks``."""
    found: list[tuple[int, int]] = []
    first, done = 0, 0
    while first < len(ends) and len(found) <= blocks:
        behind = int(np.searchsorted(ends, done + most, side="right"))
        found.append((first, behind))
        first, done = behind, int(ends[behind - 1])
    return found


def dealt(whole: int, lengths: Sequence[int], blocks: int) -> list[list[int]]:
    """Indices of the pieces that each thread block takes, in turn: first of ``whole`` equal ones, then of those in ``lengths``.

    ``whole``, a multiple of ``blocks``, is dealt round and round, so that neighbours run side by side; the rest in runs.
    """
    found = [list(range(block, whole, blocks)) for block in range(blocks if whole else 0)]
    for block, (first, behind) in enumerate(runs(lengths, blocks)):
        more = list(range(whole + first, whole + behind))
        if block < len(found):
            found[block] += more
        else:
            found.append(more)
    return found


def equal_shares(whole: Sequence[bool], blocks: int) -> list[int]:
    """Places of as many whole ones as ``blocks`` can share equally: the front of each stretch of them."""
    found: list[int] = []
    start = 0
    while start < len(whole):
        stop = start
        while stop < len(whole) and whole[stop]:
            stop += 1
        found += range(start, start + (stop - start) // blocks * blocks)
        start = max(stop, start + 1)
    return found
