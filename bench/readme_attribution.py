"""Tables of attribution for README.md and docs/, each from a file under ``results/``.

``<!-- why: FILE -->`` (what ``--explain`` wrote), ``<!-- hardware: FILE -->``, ``<!-- planted: FILE -->`` (with ``summary``
without the kinds), ``<!-- map: FILE -->``, ``<!-- bias: FILE -->``, ``<!-- silicon: FILE -->`` and ``<!-- layers: FILE
FILE,... -->``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench import step_bias_tables
from bench.attribute_hardware import Hardware
from bench.readme_logprobs import ROOT, noted
from qlab.attribution.map_result import Map
from qlab.attribution.planted import SCHEMA as PLANTED
from qlab.attribution.planted import Planted
from qlab.attribution.result import OUTPUT, Explained
from qlab.environment import Environment
from qlab.layers.result import LayersResult
from qlab.report import explain, faults, layers, maps
from qlab.report.explain_words import percent
from qlab.report.markdown import table
from qlab.serial import read_json


def why(path: Path, _: str) -> str:
    """The factors of one explanation."""
    e = Explained.read(path)
    ends = "; ".join(f"{end.path}: {end.origin}" for end in e.ends)
    return noted(explain.markdown(e), f"{e.where}; {e.tokens} tokens; {ends}; {_machine(e.environment)}", path)


def hardware(path: Path, _: str) -> str:
    """One kernel on two GPUs, shape by shape: what of the difference in outputs is due to what."""
    found = Hardware.read(path)
    columns = {"F": "fraction bits", "L": "terms per sum", "SM count": "SM count", "dequantisation": "dequantisation"}
    body = []
    for e in found.found:
        m = e.measure(OUTPUT)
        assert m is not None
        (x,) = e.layers
        rest = 1.0 if m.total else 0.0
        cells = []
        for text in columns.values():
            share = sum(p.share for p in m.parts if text in p.factor) if m.total else 0.0
            rest -= share
            cells.append(percent(share))
        shape = x.layer.replace(",", ", ")
        differing = f"{x.differing / x.elements:.2%}"
        body.append([shape, f"`{e.a}`", f"`{e.b}`", differing, f"{x.relative_l2:.2e}", *cells, percent(round(rest, 9))])
    header = ["M, K, N", "A", "B", "outputs that differ", "relative L2", *columns, "other parts of the kernel"]
    ends = sorted({end.origin for e in found.found for end in e.ends})
    note = f"random weights, groups of {found.group_size}, up to 64 rows in calls of M; ends: {' and '.join(ends)}"
    return noted(table(header, body), f"{note}; {_machine(found.environment)}", path)


def planted(path: Path, what: str) -> str:
    """How many planted faults were named: the ``summary`` alone, or every kind as well."""
    p = read_json(Planted, path, PLANTED)
    body = table(list(faults.SUMMARY), faults.summary_rows(p)) if what == "summary" else faults.markdown(p)
    return noted(body, f"seed {p.seed}; {p.seconds:.0f} s; {_machine(p.environment)}", path)


def map_of(path: Path, _: str) -> str:
    """Ranges of one function along an axis."""
    m = Map.read(path)
    return noted(maps.markdown(m), f"{m.gpu}; read off the recipes; qlab {m.environment.qlab}", path)


def bias(path: Path, _: str) -> str:
    """The closed form of a step's loss, and pairs of steps, by replay."""
    r = read_json(step_bias_tables.Result, path, step_bias_tables.SCHEMA)
    return noted(step_bias_tables.markdown(r), f"K = {r.K}, groups of {r.group_size}; {_machine(r.environment)}", path)


def silicon(path: Path, _: str) -> str:
    """Whole chains of two instructions on a GPU, against their replays."""
    r = read_json(step_bias_tables.Silicon, path, step_bias_tables.SILICON_SCHEMA)
    return noted(step_bias_tables.silicon_markdown(r), f"K = {r.K}; {_machine(r.environment)}", path)


def layer_shares(path: Path, others: str) -> str:
    """Runs of qlab.layers: what the swaps, nested or single, and the linear response say."""
    files = [path, *(ROOT / other for other in others.split(",") if other)]
    body, machines = [], list[str]()
    for file in files:
        r = LayersResult.read(file)
        largest = max(r.swaps, key=lambda s: abs(s.share))
        pair = f"`{r.paths[0]}` to `{r.paths[1]}`"
        singles = "-" if r.singles is None else percent(r.singles)
        local = max(x.local for x in r.linears)
        cells = [f"{local:.2e}", f"{r.total:.3g}", f"{layers.place(largest)}, {percent(largest.share / r.total)}"]
        gap = "-" if r.response_gap is None else percent(r.response_gap)
        which = ", ".join(dict.fromkeys(c.partition(":")[0] for c in r.checkpoints))
        body.append([pair, which, str(len(r.linears)), *cells, singles, percent(r.response), gap])
        machines.append(_machine(r.environment))
    header = ["A to B", "checkpoints", "linears", "largest local divergence", "squared L2 of log-probabilities"]
    readings = ["largest nested share", "single swaps, sum", "linear response, sum", "off nested projections by"]
    return noted(table([*header, *readings], body), "; ".join(dict.fromkeys(machines)), *files)


def _machine(e: Environment) -> str:
    return f"{e.gpu}, driver {e.driver}, torch {e.torch}" if e.gpu else f"{e.cpu}, torch {e.torch}"


KINDS: Mapping[str, Callable[[Path, str], str]] = {
    "why": why,
    "hardware": hardware,
    "planted": planted,
    "map": map_of,
    "bias": bias,
    "silicon": silicon,
    "layers": layer_shares,
}
"""Opening of a block, and what fills it from its file and the word behind that."""
