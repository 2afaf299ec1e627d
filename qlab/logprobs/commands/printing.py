"""What the trace subcommands print."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlab.logprobs.comparing import Compared, Difference
from qlab.logprobs.summary import Summary
from qlab.report.terminal import BOX, number, share


def print_summary(s: Summary, console: Console) -> None:
    """A trace's summary: what ran, on what, and how the kernels were called."""
    total, longest = sum(s.prompts), max(s.prompts)
    kept = "the whole vocabulary" if s.top_k == 0 else f"top {s.top_k}"
    sampling = f"temperature {s.temperature:g}" if s.temperature else "greedy"
    told = sampling if s.forced is None else f"tokens of {s.forced.path} ({s.forced.manifest[:12]}), {s.forced.mode}"
    lines = [
        f"[bold]{escape(s.path)}[/]: engine {s.engine}, kernels {s.origin}, {s.dtype}",
        f"{escape(s.model.name)} ({s.model.method}, {s.model.digest[:12]})",
        f"{len(s.prompts)} prompts, {total} tokens (at most {longest}), {s.new_tokens} after each: {escape(told)}; {kept}",
        f"steps of at most {s.batching.budget} tokens, {s.batching.together} sequence(s) at once",
        f"{s.rows} rows kept whole, {'digests of every row' if s.digests else 'no digests'}; {s.bytes} bytes of tensors",
        f"inputs {s.inputs[:12]}, manifest {s.digest[:12]}",
        escape(_environment(s)),
        *(escape(f"{name}: {value}") for name, value in s.notes.items()),
    ]
    console.print("\n".join(lines), soft_wrap=True)
    table = Table(box=BOX)
    for name in ("kernel", "by", "M", "linears", "calls"):
        table.add_column(name, overflow="fold")
    table.add_column("recipes", overflow="fold")
    for k in s.kernels:
        recipes = ", ".join(r[:8] for r in k.recipes[:4]) + (f" and {len(k.recipes) - 4} more" if len(k.recipes) > 4 else "")
        table.add_row(escape(k.kernel), k.origin, ", ".join(map(str, k.tokens)), str(k.linears), str(k.calls), recipes or "-")
    console.print(table)


def _environment(s: Summary) -> str:
    e = s.environment
    parts = [e.gpu or e.cpu, f"torch {e.torch}", *(f"{name} {v}" for name, v in e.packages.items() if name == "vllm")]
    return ", ".join(p for p in (*parts, f"driver {e.driver}" if e.driver else "") if p)


def print_comparison(c: Compared, console: Console) -> None:
    """The distance of two traces, per prompt and in all."""
    console.print(f"generator  {c.generator}\nother      {c.other}", highlight=False, markup=False, soft_wrap=True)
    with_digests, with_bound = not math.isnan(c.total.digests), c.total.unlisted > 0
    table = Table(box=BOX)
    table.add_column("prompt")
    for name in ("L2", "prompt's", "generated", "equal rows", "flips"):
        table.add_column(name, justify="right", overflow="fold")
    for name in ["unlisted"] * with_bound + ["digests off"] * with_digests:
        table.add_column(name, justify="right", overflow="fold")
    for name, d in (*((str(i), d) for i, d in enumerate(c.prompts, 1)), ("all", c.total)):
        cells = [*map(number, (d.distance, d.prompt, d.generated)), _identical(d), str(d.flips)]
        cells += [str(d.unlisted)] * with_bound + [_share(d.digests)] * with_digests
        table.add_row(name, *cells)
    console.print(table)
    over = "the whole vocabulary" if c.top_k == 0 else f"the generator's top {c.top_k}"
    bound = "; unlisted ids stand at the smallest value listed, at least the truth" if c.total.unlisted else ""
    off = "; digests off: rows of the linears' outputs with other bits" if with_digests else ""
    rows = "all rows, the prompt's and the generated ones; the last line has the means"
    console.print(f"L2 over {over} log-probabilities: {rows}{off}{bound}.", soft_wrap=True)


def _identical(d: Difference) -> str:
    return "-" if math.isnan(d.identical) else f"{round(d.identical * d.rows)} of {d.rows}"


def _share(v: float) -> str:
    return "-" if math.isnan(v) else share(v)
