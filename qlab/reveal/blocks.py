"""A tree over all of K from one probed leaf per block.

Kernels take k in aligned blocks, so a few stretches are told apart leaf by leaf, and the largest block is taken whose members
always lie alike: in consecutive steps of one accumulator, or as one subtree. Then one leaf stands for each block, and two
more questions for each of its steps ask whether it continues another sum or starts its own, and whether the step's members lie
below the place where its first and its last meet. Steps being equally large, that leaves no other place for any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlab.reveal.topology import Asking, Count, RevealError, Tree, build, first, leaves, span, together

STRETCH = 64
"""k in each sampled stretch."""
BLOCKS = (32, 16, 8, 4, 2)
"""Sizes of blocks that are tried, largest first; 1 asks every leaf."""


@dataclass(frozen=True)
class Template:
    """How the k of an aligned block lie in the tree, by their offsets.

    Either ``steps``: the leaves that each of its consecutive steps adds to one accumulator; or ``subtree``, complete.
    """

    size: int
    steps: tuple[tuple[int, ...], ...] = ()
    subtree: Tree = ()

    @property
    def leaf(self) -> int:
        """The offset that stands for the block: one of its first step."""
        return self.steps[0][0] if self.steps else first(self.subtree)

    @property
    def asked(self) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        """Pairs of offsets that meet in each step, or in the subtree's root, and the other offsets that must lie below."""
        if not self.steps:
            a, b = span(self.subtree)
            return [((a, b), tuple(o for o in range(self.size) if o not in (a, b)))]
        found = []
        below: list[int] = []
        for step in self.steps:
            pair = (step[0], step[-1]) if len(step) > 1 else (below[-1], step[0]) if below else None
            below += step
            if pair is not None:
                found.append((pair, tuple(o for o in below if o not in pair)))
        return found

    def on(self, start: int, before: Tree | None) -> Tree:
        """The block at ``start`` as a tree; its steps continue ``before``."""
        if not self.steps:
            return shifted(self.subtree, start)
        tree = before
        for step in self.steps:
            here: tuple[Tree, ...] = tuple(start + k for k in step)
            tree = here if tree is None else (tree, *here)
            tree = tree[0] if len(tree) == 1 else tree
        assert tree is not None
        return tree


def stretches(members: Sequence[int]) -> list[list[int]]:
    """The first and the last aligned stretch of some ascending k, without gaps."""
    found: dict[int, list[int]] = {}
    for k in members:
        found.setdefault(k // STRETCH, []).append(k)
    whole = [s for s in found.values() if len(s) == STRETCH] or list(found.values())
    return [whole[0]] if len(whole) == 1 else [whole[0], whole[-1]]


def template(samples: Sequence[Tree], size: int) -> Template | None:
    """How every aligned block of ``size`` in the sampled trees lies, if all lie alike."""
    found: Template | None = None
    for tree in samples:
        members = sorted(leaves(tree))
        if len(members) % size or members[0] % size:
            return None
        for start in range(members[0], members[-1] + 1, size):
            here = _steps(tree, start, size) or _subtree(tree, start, size)
            if here is None or (found is not None and here != found):
                return None
            found = here
    return found


def cover(members: Sequence[int], form: Template | None, big: float) -> Asking[Tree]:
    """The tree over some ascending k, in whole blocks of ``form``, or leaf by leaf without one."""
    if form is None:
        tree = yield from build(members, big)
        return tree
    leaf, size = form.leaf, form.size
    if len(members) % size or any(k // size != members[i // size * size] // size for i, k in enumerate(members)):
        raise RevealError(f"the k are not whole blocks of {size}")
    found = [k for k in members if k % size == leaf % size]
    tree = yield from build(found, big)
    asked = form.asked
    outside: list[Count] = []
    inside: list[Count] = []
    for k in found:
        start = k - leaf
        for (a, b), below in asked:
            outside.append(Count(start + a, start + b, tuple(o for o in found if o != k)))
            inside.append(Count(start + a, start + b, tuple(start + o for o in below)))
    swamped = yield [*outside, *inside]
    reach: dict[int, int] = {}
    for i, (question, count) in enumerate(zip(inside, swamped[len(outside) :], strict=True)):
        k = found[i // len(asked)]
        if count != len(question.units) or reach.setdefault(k, int(swamped[i]) + 1) != swamped[i] + 1:
            raise RevealError(f"k {k - leaf}:{k - leaf + size} does not lie as the sampled blocks do")
    return _expand(tree, form, reach)[0]


def _expand(tree: Tree, form: Template, reach: dict[int, int]) -> tuple[Tree, int]:
    """The tree with blocks for leaves, and how many leaves it had. ``reach`` is how many blocks a block's first step sums."""
    chain: list[tuple[int, ...]] = []  # what each sum adds to the one below it; without recursion, for chains are deep
    while not isinstance(tree, int) and len(sums := [c for c in tree if not isinstance(c, int)]) == 1:
        chain.append(tuple(c for c in tree if isinstance(c, int)))
        tree = sums[0]
    if isinstance(tree, int):
        found, size = _alone(tree, form, reach), 1
    else:
        parts = [_expand(c, form, reach) for c in tree if not isinstance(c, int)]
        mine = tuple(c for c in tree if isinstance(c, int))
        size = len(mine) + sum(s for _, s in parts)
        found = _sum([p for p, _ in parts], mine, size, form, reach)
    for mine in reversed(chain):
        size += len(mine)
        found = _sum([found], mine, size, form, reach)
    return found, size


def _sum(parts: list[Tree], blocks: tuple[int, ...], size: int, form: Template, reach: dict[int, int]) -> Tree:
    """One sum of ``size`` blocks: of parts, of blocks whose first step it is, and of blocks that are sums of their own."""
    inside = [b for b in blocks if reach[b] == size]
    parts = parts + [_alone(b, form, reach) for b in blocks if reach[b] != size]
    if not inside:
        return tuple(parts)
    if len(inside) == 1 and len(parts) == 1:
        return form.on(inside[0] - form.leaf, parts[0])
    if len(form.steps) != 1:
        raise RevealError(f"blocks at k={inside} share a step, and the sampled blocks have {len(form.steps)} steps each")
    return (*parts, *(b - form.leaf + o for b in inside for o in form.steps[0]))


def _alone(block: int, form: Template, reach: dict[int, int]) -> Tree:
    if reach[block] != 1:
        raise RevealError(f"the block of k={block} continues a sum of {reach[block]} blocks that it does not meet")
    return form.on(block - form.leaf, None)


def _steps(tree: Tree, start: int, size: int) -> Template | None:
    members = range(start, start + size)
    found: list[tuple[tuple[int, ...], tuple[Tree, ...]]] = []
    _sums_of(tree, members, found)
    steps = [step for step, _ in found]
    if sum(map(len, steps)) != size:
        return None
    for t, (step, node) in enumerate(found[1:]):
        sums = [c for c in node if not isinstance(c, int)]
        if len(node) != len(step) + 1 or sums != [found[t][1]]:
            return None
    if len(found) > 1:
        step, node = found[0]
        before = [c for c in node if c not in step]
        if len(before) > 1 or any(isinstance(c, int) for c in before):
            return None
        if not before and len(step) == 2 and all(len(s) == 1 for s in steps[1:]):
            steps[:1] = [(k,) for k in sorted(step)]  # two leaves commute; which of them starts does not count
    return Template(size, tuple(tuple(sorted(k - start for k in step)) for step in steps))


def _sums_of(tree: Tree, members: range, found: list[tuple[tuple[int, ...], tuple[Tree, ...]]]) -> None:
    """Sums that have members for addends, lower ones first."""
    if isinstance(tree, int):
        return
    for child in tree:
        _sums_of(child, members, found)
    if mine := tuple(c for c in tree if isinstance(c, int) and c in members):
        found.append((mine, tree))


def _subtree(tree: Tree, start: int, size: int) -> Template | None:
    if isinstance(tree, int):
        return None
    mine = sorted(leaves(tree))
    if mine == list(range(start, start + size)):
        return Template(size, subtree=_ordered(shifted(tree, -start)))
    for child in tree:
        if (found := _subtree(child, start, size)) is not None:
            return found
    return None


def shifted(tree: Tree, by: int) -> Tree:
    """The tree with every k moved."""
    return tree + by if isinstance(tree, int) else tuple(shifted(c, by) for c in tree)


def _ordered(tree: Tree) -> Tree:
    """The same tree with the children of each sum by their smallest leaf."""
    if isinstance(tree, int):
        return tree
    return tuple(sorted((_ordered(c) for c in tree), key=lambda c: min(leaves(c))))


def sample(found: Sequence[Sequence[int]], big: float) -> Asking[list[Tree]]:
    """The trees over some stretches, each alone."""
    trees = yield from together([build(s, big) for s in found])
    return trees
