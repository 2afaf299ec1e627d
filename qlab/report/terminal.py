"""The lab's result as tables for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlab.compare import OffDiagonal
from qlab.lab.results import TOTAL, LabResult, Pairs

BOX = box.SIMPLE_HEAD


def show(result: LabResult, console: Console, *, every_layer: bool = False) -> None:
    """Print the whole result; ``every_layer`` adds each layer's pairwise matrix to the total's."""
    console.print(header(result))
    console.print(kernel_table(result))
    if skipped := skipped_table(result):
        console.print(skipped)
    if result.ran():
        console.print(*layer_tables(result, console.width))
        for p in result.pairs:
            if len(p.keys) > 1 and (every_layer or p.layer == TOTAL):
                console.print(*matrix(p, console.width))
    console.print(dispatch_table(result))
    if result.against:
        console.print(against_table(result))
    if result.probes:
        console.print(probe_table(result))


def header(r: LabResult) -> RenderableType:
    hw = r.hardware
    lines = [
        f"[bold]{hw.asked}[/] on {escape(hw.running)}: {escape(hw.note)}",
        *map(escape, r.checkpoints),
        f"{escape(r.model)}; mode [bold]{r.mode}[/], {r.dtype}, seed {r.seed}, {len(r.inputs)} inputs, "
        f"digest [bold]{r.digest[:16]}[/]",
        f"torch {r.environment.torch}, triton {r.environment.triton}"
        + (f", driver {r.environment.driver}" if r.environment.driver else "")
        + f"; {r.seconds:.1f} s",
    ]
    return Panel(Text.from_markup("\n".join(lines)), title="qlab.kernels", title_align="left", expand=False)


class Titled:
    """A table under a title that may be wider than it."""

    def __init__(self, title: str, gap: int = 1) -> None:
        self.title, self.table = title, Table(box=BOX, padding=(0, gap, 0, 0), pad_edge=False)
        self.row = self.table.add_row

    def column(self, name: str, **options: Any) -> None:
        """A column whose words are broken where they do not fit, and never cut."""
        self.table.add_column(name, overflow="fold", **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        yield self.table


def kernel_table(r: LabResult) -> Titled:
    """Kernels that ran, over all layers: distance from float64, repeatability, bitwise class.

    Where repeated runs differ their largest distance is shown, else how many runs were the same; ``fixed`` is a replay whose
    recipe leaves nothing to chance.
    """
    t = Titled("Error against float64, all layers", gap=0)
    t.column("", justify="right", no_wrap=True)
    t.column("kernel", no_wrap=True, vertical="bottom")
    t.column("by", no_wrap=True, vertical="bottom")
    compared = any(c.replay_bits is not None for c in r.cells)
    for name in ("rel. L2", "ULP\nmed", "ULP\nmax", "error/\nΣ|x||w|", "noise\nor same", *["bits\noff"] * compared, "cl."):
        t.column(name, justify="right", no_wrap=True, vertical="bottom")
    letters, numbers = class_letters(r), numbered(r.ran())
    for key in r.ran():
        c = r.cell(TOTAL, key)
        assert c.error is not None
        e = c.error
        noise = "-" if c.repeatable is None else "fixed" if c.runs == 1 else f"{c.runs}/{c.runs}"
        if c.repeatable is False and c.noise_floor is not None:
            noise = f"[red]{number(c.noise_floor)}[/]"
        off = [] if not compared else ["-" if c.replay_bits is None else f"[red]{c.replay_bits}[/]" if c.replay_bits else "0"]
        figures = (number(e.relative_l2), number(e.ulp_median), number(e.ulp_max), number(e.backward))
        t.row(numbers[key], key, c.origin, *figures, noise, *off, letters.get(key, ""))
    return t


def skipped_table(r: LabResult) -> Titled | None:
    """Kernels that did not run on every layer, with their reasons."""
    ran = set(r.ran())
    missing = [c for c in r.columns if c.key not in ran]
    if not missing:
        return None
    t = Titled("Did not run")
    t.column("why", ratio=1)
    t.column("kernels", ratio=1)
    layers = [name for name in r.layers() if name != TOTAL]
    reasons: dict[str, list[str]] = {}
    for c in missing:
        refused = [cell for cell in r.cells if cell.key == c.key and cell.reason and cell.layer != TOTAL]
        where = "" if len(refused) == len(layers) else f" ({len(refused)} of {len(layers)} layers, first {refused[0].layer})"
        reasons.setdefault(refused[0].reason + where, []).append(c.key)
    for reason, keys in reasons.items():
        t.row(escape(reason), ", ".join(keys))
    return t


def layer_tables(r: LabResult, width: int) -> Iterator[Titled]:
    """Relative L2 error of every kernel, by number: rows are the layers, then the total."""
    layers = [short(name) for name in r.layers()]
    shapes = {short(i.layer): f"{i.M},{i.K},{i.N}" for i in r.inputs}
    widest = max(map(len, layers))
    labels = [name if name == shapes.get(name) else f"{name:<{widest}}  {shapes.get(name, '')}".rstrip() for name in layers]
    errors = [[r.cell(layer, key).error for key in r.ran()] for layer in r.layers()]
    rows = [["-" if e is None else number(e.relative_l2) for e in row] for row in errors]
    yield from _chunked("Relative L2 error by layer (M,K,N); columns are the kernels above", labels, rows, width)


def matrix(p: Pairs, width: int) -> Iterator[RenderableType]:
    """Relative L2 distance below the diagonal, share of differing outputs above it."""
    where = "all layers" if p.layer == TOTAL else p.layer
    numbers = numbered(p.keys)
    rows = []
    for i in range(len(p.keys)):
        below = [number(v) for v in p.relative_l2[i][:i]]
        above = [share(v) for v in p.differing[i][i + 1 :]]
        rows.append([*below, "·", *above])
    labels = [f"{numbers[key]:>2} {key}" for key in p.keys]
    yield from _chunked(f"Pairwise, {where}: relative L2 below the diagonal, differing outputs above", labels, rows, width)
    lines = [_hanging(f"    {letter(i)}  ", ", ".join(c), width) for i, c in enumerate(p.classes)]
    yield Text("\n".join([f"  {spread(p.spread)}", "  bitwise equivalence classes:", *lines, ""]))


def _hanging(label: str, text: str, width: int) -> str:
    """``text`` behind ``label``, its further lines below its first."""
    return textwrap.fill(
        text, width, initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False, break_on_hyphens=False
    )


def _chunked(title: str, labels: list[str], rows: list[list[str]], width: int) -> Iterator[Titled]:
    """A table with numbered columns, cut into as many tables as the terminal's width asks for."""
    fit = max(1, (width - max(map(len, labels)) - 2) // 9)
    count = len(rows[0])
    for start in range(0, count, fit):
        t = Titled(title if start == 0 else f"{title}, continued", gap=0)
        t.column("", no_wrap=True)
        for j in range(start, min(start + fit, count)):
            t.column(str(j + 1), justify="right", no_wrap=True, min_width=8)
        for label, row in zip(labels, rows, strict=True):
            t.row(label, *row[start : start + fit], style="bold" if label.startswith(TOTAL) else "")
        yield t


def dispatch_table(r: LabResult) -> Titled:
    """Which kernel each of vLLM's labels gets on the asked GPU; layers with the same answer share a row."""
    t = Titled(f"What vLLM runs on {r.hardware.asked} for these shapes")
    for name in ("label", "kernel", "layers", "why"):
        t.column(name, no_wrap=name in ("label", "kernel"))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for d in r.dispatch:
        rows.setdefault((d.label, d.kernel, d.reason), []).append(short(d.layer))
    every = len({d.layer for d in r.dispatch})
    for (label, kernel, reason), layers in sorted(rows.items()):
        where = f"all {every}" if len(layers) == every > 1 else " ".join(layers)
        t.row(label, kernel or "refused", escape(where), escape(reason))
    return t


def against_table(r: LabResult) -> Titled:
    """The same kernels and labels on another GPU."""
    assert r.against is not None
    basis = "replayed" if r.against.proved else "replayed, a prediction"
    t = Titled(f"Outputs that differ between {r.hardware.asked} and {r.against.gpu} ({basis})")
    t.column("kernel or label", no_wrap=True)
    for name in ("outputs", "bits", "rel. L2"):
        t.column(name, justify="right", no_wrap=True)
    t.column("other order of summation on")
    layers = [name for name in r.layers() if name != TOTAL]
    reasons: dict[str, list[str]] = {}
    for row in r.against.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.key)
            continue
        where = layer_names(row.other_order, layers)
        if row.kernel != row.other_kernel:
            where = f"{short_kernel(row.kernel)} here, {short_kernel(row.other_kernel)} on {r.against.gpu}"
        t.row(row.key, share(row.differing / row.outputs), str(row.bits), number(row.relative_l2), where)
    for reason, keys in reasons.items():
        t.row(
            "1 not compared" if len(keys) == 1 else f"{len(keys)} not compared",
            "-",
            "-",
            "-",
            escape(f"{reason}: {', '.join(keys)}"),
        )
    return t


def layer_names(some: tuple[str, ...], every: list[str]) -> str:
    """Layer names in short: their kinds where every block's is among them."""
    if not some:
        return "none, the step alone"
    if len(some) == len(every):
        return "every layer" if len(every) > 1 else "the layer"
    kinds: dict[str, int] = {}
    for name in some:
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    whole = all(count == sum(name.rpartition(".")[2] == kind for name in every) for kind, count in kinds.items())
    return ", ".join(kinds) if whole else " ".join(short(name) for name in some)


def short_kernel(name: str) -> str:
    return name.removeprefix("vllm.")


def probe_table(r: LabResult) -> Titled:
    """One-hot probe: decoded weights against the expected ones."""
    t = Titled("One-hot probe: each kernel's decoded weight, bit for bit")
    t.column("kernel", no_wrap=True)
    t.column("layer", no_wrap=True)
    t.column("mismatches", justify="right", no_wrap=True)
    t.column("finding")
    refused: dict[str, list[str]] = {}
    for key in dict.fromkeys(p.key for p in r.probes):
        mine = [p for p in r.probes if p.key == key]
        good = [p for p in mine if not p.reason and not p.mismatches]
        if good:
            t.row(
                key,
                "1 layer" if len(good) == 1 else f"{len(good)} layers",
                f"0 of {sum(p.elements for p in good)}",
                "[green]as packed[/]",
            )
        for p in mine:
            if p.mismatches:
                t.row(key, short(p.layer), f"[red]{p.mismatches} of {p.elements}[/]", escape(p.diagnosis))
        if reasons := [p.reason for p in mine if p.reason]:
            refused.setdefault(reasons[0], []).append(key)
    for reason, keys in refused.items():
        t.row("1 kernel" if len(keys) == 1 else f"{len(keys)} kernels", "", "-", escape(f"{reason}: {', '.join(keys)}"))
    return t


def class_letters(r: LabResult) -> dict[str, str]:
    """Kernel to the letter of its bitwise class over all layers."""
    total = next((p for p in r.pairs if p.layer == TOTAL), None)
    if total is None:
        return {}
    return {key: letter(i) for i, c in enumerate(total.classes) for key in c}


def letter(index: int) -> str:
    """A to Z, then AA to AZ, BA and so on."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def numbered(keys: tuple[str, ...]) -> dict[str, str]:
    return {key: str(i + 1) for i, key in enumerate(keys)}


def short(name: str) -> str:
    """Layer and kernel names without what every one of them shares."""
    return name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "")


def number(v: float) -> str:
    if v == 0 or not math.isfinite(v):
        return f"{v:g}"
    if 0.01 <= v < 999.5:
        return f"{v:.3g}"
    mantissa, _, exponent = f"{v:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def share(v: float) -> str:
    return "0" if v == 0 else "<0.01%" if v < 5e-5 else f"{100 * v:.2f}%"


def spread(s: OffDiagonal | None) -> str:
    return "" if s is None else f"off the diagonal: mean {number(s.mean)}, range {number(s.low)} to {number(s.high)}"
