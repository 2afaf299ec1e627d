"""A Merkle tree over sha256: one root commits to a list, and a proof of log2(n) digests shows what stands at one place of it.

The tree is RFC 6962's: a level's last node without a partner goes up as it is, so that no leaf is doubled. Leaves and nodes
are hashed under different first bytes, so that no node can be shown as a leaf; a leaf's hash covers its index, and who checks
knows the number of leaves, which fixes the proof's length and the side of every digest in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qlab.errors import QlabError

LEAF, NODE = b"\x00", b"\x01"
WIDTH = 32
"""Bytes of a digest."""


def leaf(index: int, payload: bytes) -> bytes:
    """Digest of what stands at ``index``."""
    return hashlib.sha256(LEAF + index.to_bytes(8, "big") + payload).digest()


def node(left: bytes, right: bytes) -> bytes:
    """Digest of two digests."""
    return hashlib.sha256(NODE + left + right).digest()


class Tree:
    """All levels over some leaves, their digests first. Raises QlabError without a leaf."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise QlabError("a Merkle tree needs one leaf at least")
        self.levels = [list(leaves)]
        while len(self.levels[-1]) > 1:
            last = self.levels[-1]
            pairs = [node(last[i], last[i + 1]) for i in range(0, len(last) - 1, 2)]
            self.levels.append(pairs + last[len(last) & ~1 :])

    @property
    def root(self) -> bytes:
        return self.levels[-1][0]

    def prove(self, index: int) -> tuple[bytes, ...]:
        """The partners on the way from a leaf to the root. Raises QlabError for an index beyond the leaves."""
        if not 0 <= index < len(self.levels[0]):
            raise QlabError(f"there is no leaf {index} among {len(self.levels[0])}")
        proof = []
        for level in self.levels[:-1]:
            if index ^ 1 < len(level):
                proof.append(level[index ^ 1])
            index >>= 1
        return tuple(proof)


def proves(root: bytes, leaves: int, index: int, digest: bytes, proof: Sequence[bytes]) -> bool:
    """Whether ``digest`` is the one at ``index`` of the ``leaves`` under ``root``."""
    if not 0 <= index < leaves or any(len(p) != WIDTH for p in proof):
        return False
    rest, count = list(proof), leaves
    while count > 1:
        if index ^ 1 < count:
            if not rest:
                return False
            other = rest.pop(0)
            digest = node(other, digest) if index & 1 else node(digest, other)
        index, count = index >> 1, (count + 1) >> 1
    return not rest and digest == root
