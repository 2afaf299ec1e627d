"""Recipes and their trees as text: runs of k folded, equal siblings folded, equal trees written once."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qlab.recipe import WEIGHTS, Chain, Join, Node, Opaque, Recipe, Region, Round, Run, Step, Type, Unordered, key, nodes, plain

WIDTH = 120
RUNS = 4
"""Runs of a chain's walk that are written out."""
TREES = 3
"""Trees of a recipe that are written out."""
PARTS = 12
"""Lines of a node's parts that are written out."""
COLUMNS = 6


def recipe_text(recipe: Recipe) -> str:
    """A recipe in a few lines: what is multiplied, then each region of the output with its sum."""
    steps = common_steps(r.tree for r in recipe.regions)
    lines = [
        f"M={recipe.M} K={recipe.K} N={recipe.N} {recipe.dtype}, w = {WEIGHTS[recipe.weights]}, "
        f"rows {recipe.rows}, recipe {recipe.hash[:16]}"
    ]
    if len(steps) == 1:
        lines.append(f"every chain: {steps[0]}")
    groups: dict[str, list[Region]] = {}  # by tree
    for region in recipe.regions:
        groups.setdefault(key(region.tree), []).append(region)
    for i, regions in enumerate(groups.values()):
        if i == TREES and len(groups) > TREES + 1:
            left = sum(map(len, list(groups.values())[TREES:]))
            lines.append(f"{len(groups) - TREES} more trees, in {left} regions")
            break
        lines += [f"{_where(r)}: {r.output} of" for r in regions[:TREES]]
        if len(regions) > TREES:
            lines.append(f"and {len(regions) - TREES} more regions: the same of")
        lines += ["  " + line for line in tree_lines(regions[0].tree, steps=len(steps) > 1)]
    return "\n".join(lines)


def tree_text(node: Node) -> str:
    """A tree in a few lines; what all its chains have in common stands above."""
    steps = common_steps([node])
    head = [f"every chain: {steps[0]}"] if len(steps) == 1 else []
    return "\n".join([*head, *tree_lines(node, steps=len(steps) > 1)])


def common_steps(trees: object) -> list[Step]:
    """The steps of all chains in some trees, each once."""
    return list(dict.fromkeys(n.step for t in trees for n in nodes(t) if isinstance(n, Chain)))  # type: ignore[attr-defined]


def tree_lines(node: Node, *, steps: bool = False) -> list[str]:
    """A tree as indented lines; ``steps`` names the step of each chain."""
    return _lines(spined(node), steps)


def spined(node: Node, toward: int = -1) -> Node:
    """The same sums, written so that the part of more k is always the one to which the other is added.

    A recipe's normal form is made for hashing; this one reads as the kernel runs: one sum to which parts are added in turn. Of
    two like parts the one further from what is added next, which lies at k ``toward``, comes first.
    """
    if isinstance(node, Round):
        return Round(spined(node.node, toward), node.type)
    if isinstance(node, Unordered):
        return Unordered(tuple(sorted(map(spined, node.parts), key=_place)), node.type, node.scaled)
    if not isinstance(node, Join):
        return node
    places = [_place(p)[0] for p in node.parts]
    total = spined(node.parts[0], places[1])
    for i, part in enumerate(node.parts[1:], start=1):
        after = places[i + 1] if i + 1 < len(places) else toward
        total = _added(total, spined(part, min(places[:i])), node.type, after)
    return total


def _added(a: Node, b: Node, type: Type, toward: int) -> Node:
    def order(n: Node) -> tuple[bool, int, int, tuple[int, str]]:
        place = _place(n)
        spine = isinstance(n, Join) and n.type == type
        return not spine, -_k(n), -abs(place[0] - toward) if spine and toward >= 0 else 0, place

    a, b = sorted((a, b), key=order)
    return Join((*(a.parts if isinstance(a, Join) and a.type == type else (a,)), b), type)


def _k(node: Node) -> int:
    return sum(r.length * r.count for n in nodes(node) if isinstance(n, Chain) for r in n.walk)


def _starts(node: Node) -> list[int]:
    return [r.start for n in nodes(node) if isinstance(n, Chain) for r in n.walk]


def _place(node: Node) -> tuple[int, str]:
    return min(_starts(node), default=-1), key(node)


def _lines(node: Node, steps: bool) -> list[str]:
    line = one_line(node, steps)
    if len(line) <= WIDTH - 20:
        return [line]
    if isinstance(node, Round):
        return [f"RN {node.type} of", *("  " + text for text in _lines(node.node, steps))]
    if not isinstance(node, Join | Unordered):
        return textwrap.wrap(line, WIDTH - 20, subsequent_indent="  ")
    order = "one after the other" if isinstance(node, Join) else "in any order"
    scaled = ", each scaled by the column's scale" if isinstance(node, Unordered) and node.scaled else ""
    out = [f"{len(node.parts)} parts added in {node.type}, {order}{scaled}:"]
    sign = " + " if isinstance(node, Join) else ", "
    together = ""
    groups = _folded(node.parts)
    for i, (first, count, shift) in enumerate(groups):
        if i >= PARTS and len(groups) > i + 1:
            left = sum(c for _, c, _ in groups[i:])
            return [*out, *([f"  {together}"] if together else []), f"  and {left} more parts"]
        text = _in_brackets(first, steps)
        if count == 1 and len(text) <= WIDTH // 3:
            if together and len(together) + len(text) > WIDTH - 24:
                out.append(f"  {together}")
                together = ""
            together += (sign if together else "") + text
            continue
        if together:
            out.append(f"  {together}")
            together = ""
        head = "" if count == 1 else f"{count} x, k {shift:+d} each: "
        below = [text] if len(text) <= WIDTH - 20 else _lines(first, steps)
        out += [f"  {head}{below[0]}", *("    " + line for line in below[1:])]
    return [*out, f"  {together}"] if together else out


def one_line(node: Node, steps: bool = False) -> str:
    """A tree as a formula; long for a large one."""
    if isinstance(node, Chain):
        return f"{walk_text(node.walk)}{f' ({node.step})' if steps else ''}"
    if isinstance(node, Round):
        return f"RN {node.type}({one_line(node.node, steps)})"
    if isinstance(node, Opaque):
        return f"opaque: {node.name}"
    sign = f" +{'' if node.type == 'fp32' else node.type} "
    parts = [_in_brackets(p, steps) for p in node.parts]
    if isinstance(node, Join):
        return sign.join(parts)
    return f"atomics {node.type}{' scaled' if node.scaled else ''}[{', '.join(parts)}]"


def _in_brackets(node: Node, steps: bool) -> str:
    text = one_line(node, steps)
    return f"({text})" if isinstance(node, Join) else text


def walk_text(walk: Sequence[Run]) -> str:
    """``k 0:32 +128 x8``: 8 stretches of 32, each 128 behind the one before it."""
    if len(walk) <= RUNS:
        return f"k {', '.join(map(str, walk)) or 'none'}"
    count = sum(r.length * r.count for r in walk)
    return f"k {', '.join(map(str, walk[: RUNS - 1]))}, ... ({count} k in {len(walk)} runs)"


def _folded(parts: Sequence[Node]) -> list[tuple[Node, int, int]]:
    """(first, count, shift): runs of three parts or more that are the first one with all k moved by multiples of the shift."""
    shapes = [_shape(p) for p in parts]
    out: list[tuple[Node, int, int]] = []
    i = 0
    while i < len(parts):
        j, shift = i + 1, 0
        if j < len(parts) and shapes[j][0] == shapes[i][0]:
            shift = shapes[j][1] - shapes[i][1]
            while j < len(parts) and shapes[j] == (shapes[i][0], shapes[i][1] + (j - i) * shift):
                j += 1
        j = j if j - i > 2 else i + 1
        out.append((parts[i], j - i, shift))
        i = j
    return out


def _shape(node: Node) -> tuple[str, int]:
    """A node with its smallest k moved to 0, as text, and that k."""
    least = min(_starts(node), default=0)
    return repr(_moved(plain(node), least)), least


def _moved(data: object, by: int) -> object:
    if isinstance(data, list) and data and data[0] == "chain":
        return ["chain", data[1], [[start - by, *rest] for start, *rest in data[2]]]
    return [_moved(d, by) for d in data] if isinstance(data, list) else data


def _where(region: Region) -> str:
    ranges = _ranges(region.columns)
    return f"rows {region.rows[0]}:{region.rows[1]}, columns {ranges}"


def _ranges(columns: Sequence[tuple[int, int]]) -> str:
    runs: list[Run] = []
    i = 0
    while i < len(columns):
        start, width = columns[i][0], columns[i][1] - columns[i][0]
        j, stride = i + 1, 0
        if j < len(columns):
            stride = columns[j][0] - start
            while j < len(columns) and columns[j] == (start + (j - i) * stride, start + (j - i) * stride + width):
                j += 1
        runs.append(Run(start, width, j - i, stride if j > i + 1 else 0))
        i = j
    more = f" and {len(runs) - COLUMNS} more ranges" if len(runs) > COLUMNS else ""
    return ", ".join(map(str, runs[:COLUMNS])) + more
