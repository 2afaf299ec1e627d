"""Tables of our INT4 kernels for README and docs.

``<!-- layer-speed: FILE TABLE -->``: TABLE is ``ratios`` (the default), ``memory``, ``blocks``, ``targets``, ``prices`` or
MODEL.LAYER. ``<!-- kernel-proof: FILE LATER -->``: LATER is another proof, whose parts stand in the place of those that FILE
has of the same name.
"""

from __future__ import annotations

import json
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
    "prices": layer_summary.prices,
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


def kernel_proof(path: Path, later: str) -> str:
    """What was claimed of the kernels' bits, and how many outputs were found to differ."""
    files = [path, *([ROOT / later] if later else [])]
    proofs = [json.loads(f.read_text()) for f in files]
    parts = {part["name"]: part for proof in proofs for part in proof["parts"]}
    rows = [
        [f"`{name}`", claim["name"], *(f"{claim[n]:,}" for n in ("problems", "outputs", "differing_outputs", "differing_bits"))]
        for name, part in parts.items()
        for claim in part["claims"]
        if claim["outputs"]
    ]
    heading = ["part", "held against", "problems", "outputs compared", "that differ", "**bits that differ**"]
    e = proofs[0]["environment"]
    where = f"{e['gpu']}, driver {e['driver']}, torch {e['torch']}, triton {e['triton']}; {proofs[0]['extension']}"
    names = " and ".join(f"`{f.relative_to(ROOT) if f.is_relative_to(ROOT) else f.name}`" for f in files)
    return f"{table(heading, rows)}\n\n<sub>{where}. From {names}.</sub>"


KINDS = {"layer-speed": layer_speed, "kernel-proof": kernel_proof}
