"""Do two GPUs compute the same bits? Compare two recordings made by ``bench/record_silicon.py``, output by output.

    python -m bench.compare_recordings results/h100/silicon.json results/h200/silicon.json --json results/h100-h200.json

Both must have recorded the same problems with the same inputs and the same build of vLLM. A record counts as repeatable when
it was so on both GPUs; what is not repeatable cannot tell two GPUs apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qlab.errors import QlabError
from qlab.serial import write_json

SCHEMA = "qlab.recordings/1"


@dataclass(frozen=True)
class Kernel:
    """One kernel's outputs on both GPUs: whole outputs, compared by sha256."""

    name: str
    problems: int
    repeatable: int
    """Problems on which both GPUs gave the same bits in every run."""
    equal: int
    """Repeatable problems whose outputs are bitwise equal on the two GPUs."""


@dataclass(frozen=True)
class Comparison:
    schema: str
    gpus: tuple[str, ...]
    drivers: tuple[str, ...]
    extension: str
    """sha256 of vLLM's extension on both."""
    problems: int
    kernels: tuple[Kernel, ...]


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Raises QlabError when the two recordings are not of the same problems, inputs or build."""
    inputs = [
        ([p["input_digest"] for p in r["problems"]], [c["weight_digest"] for c in r["cases"]], r["extension"]["sha256"])
        for r in (a, b)
    ]
    for what, x, y in zip(("inputs", "weights", "builds of vLLM"), *inputs, strict=True):
        if x != y:
            raise QlabError(f"the two recordings have different {what}; record both with the same version of qlab and vLLM")
    first, second = ({(r["kernel"], r["problem"]): r for r in x["records"] if "digest" in r} for x in (a, b))
    found = []
    for name in sorted({kernel for kernel, _ in first.keys() & second.keys()}):
        keys = [k for k in first.keys() & second.keys() if k[0] == name]
        stable = [k for k in keys if first[k]["repeatable"] and second[k]["repeatable"]]
        found.append(Kernel(name, len(keys), len(stable), sum(first[k]["digest"] == second[k]["digest"] for k in stable)))
    environments = [r["environment"] for r in (a, b)]
    gpus, drivers = (tuple(e[key] for e in environments) for key in ("gpu", "driver"))
    return Comparison(SCHEMA, gpus, drivers, inputs[0][2], len(a["problems"]), tuple(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, nargs=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        result = compare(*(json.loads(path.read_text()) for path in args.recordings))
        if args.json:
            write_json(args.json, result)
    except (OSError, ValueError) as e:  # QlabError is a ValueError
        print(f"compare_recordings: {e}", file=sys.stderr)
        return 2
    table = Table("kernel", box=box.SIMPLE_HEAD)
    for column in ("problems", "repeatable on both", "bitwise equal"):
        table.add_column(column, justify="right")
    for k in result.kernels:
        table.add_row(k.name, str(k.problems), str(k.repeatable), str(k.equal))
    console = Console()
    console.print(f"{' and '.join(result.gpus)}: {result.problems} problems, equal inputs")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
