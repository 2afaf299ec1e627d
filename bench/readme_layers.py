"""Tables of the layers' benchmark for README and docs: ``<!-- layer-speed: FILE TABLE -->``.

TABLE is ``ratios`` (the default), ``memory``, ``blocks``, ``targets`` or ``MODEL.LAYER``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import layer_summary
from bench.layer_results import Result
from qlab.errors import QlabError
from qlab.report.markdown import table

ROOT = Path(__file__).resolve().parent.parent
TABLES: dict[str, Callable[[Result], layer_summary.Rows]] = {
    "ratios": layer_summary.ratios,
    "memory": layer_summary.memory,
    "blocks": layer_summary.blocks,
    "targets": layer_summary.targets,
}


def layer_speed(path: Path, what: str) -> str:
    """One table with its source. Raises QlabError for a table that the file does not have."""
    r = Result.read(path)
    model, _, name = (what or "ratios").rpartition(".")
    if not model and name in TABLES:
        heading, lines = TABLES[name](r)
    elif any((c.model, c.layer) == (model, name) for c in r.cells):
        heading, lines = layer_summary.layer(r, model, name)
    else:
        raise QlabError(f"{path} has no table {what!r}; there are {', '.join(TABLES)} and MODEL.LAYER")
    source = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{table(heading, lines)}\n\n<sub>{layer_summary.caption(r)}. From `{source}`.</sub>"


KINDS = {"layer-speed": layer_speed}
