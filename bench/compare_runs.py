"""Does a GPU itself give the log-probabilities that its replay gives elsewhere? Two folders of finished runs, run by run.

    python -m qlab.logprobs experiment --out native     # on the GPU
    python -m qlab.logprobs experiment --out replayed   # on any machine
    python -m bench.compare_runs native/runs replayed/runs --json results/h200/runs.json

A run's file is named after everything that decides its numbers but the machine, so runs of the same name are the same question.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qlab import environment
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import write_json

SCHEMA = "qlab.runs/1"


@dataclass(frozen=True)
class PathRuns:
    """Runs of one path that both folders hold."""

    path: str
    kernels: tuple[str, ...]
    """What ran in the first folder and in the second, by kernel and origin."""
    runs: int
    tokens: int
    logprobs: int
    """Log-probabilities compared."""
    differing: int
    """Of these, with other bits or of another token."""
    largest: float
    """Largest difference of a log-probability of the same token."""


@dataclass(frozen=True)
class ComparedRuns:
    schema: str
    environment: Environment
    paths: tuple[PathRuns, ...]
    alone: tuple[int, ...]
    """Runs that only the first or only the second folder holds."""


def read(file: Path) -> tuple[str, frozenset[str], list[Tensor]]:
    """Path, kernels with their origin, and tokens, ids and log-probabilities of a run. Raises QlabError naming the file."""
    try:
        with safe_open(file, "pt") as f:
            about = json.loads(f.metadata()["run"])
            parts = [f.get_tensor(name) for name in ("tokens", "ids", "logprobs")]
    except Exception as e:
        raise QlabError(f"{file} is no finished run: {e}") from None
    return about["path"], frozenset(f"{c['kernel']} ({c['origin']})" for c in about["calls"]), parts


def compare(a: Path, b: Path) -> ComparedRuns:
    """Runs of equal names in two folders."""
    first, second = ({f.name: f for f in folder.glob("*.safetensors")} for folder in (a, b))
    if not first.keys() & second.keys():
        raise QlabError(f"{a} and {b} hold no run in common; make both with the same options and checkpoints")
    found: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
    kernels: dict[str, set[str]] = {}
    for name in sorted(first.keys() & second.keys()):
        (path, one, mine), (_, other, theirs) = read(first[name]), read(second[name])
        found.setdefault(path, []).append((mine, theirs))
        kernels.setdefault(path, set()).update(one | other)
    paths = tuple(_path(path, tuple(sorted(kernels[path])), pairs) for path, pairs in sorted(found.items()))
    alone = (len(first.keys() - second.keys()), len(second.keys() - first.keys()))
    return ComparedRuns(SCHEMA, environment.collect(details=False), paths, alone)


def _path(path: str, kernels: tuple[str, ...], pairs: list[tuple[list[Tensor], list[Tensor]]]) -> PathRuns:
    tokens = total = differing = 0
    largest = 0.0
    for (mine, my_ids, my_logp), (theirs, ids, logp) in pairs:
        tokens += len(mine)
        total += my_logp.numel()
        if not torch.equal(mine, theirs) or my_ids.shape != ids.shape:
            differing += my_logp.numel()
            continue
        same = my_ids == ids
        differing += int((~same | (my_logp.view(torch.int32) != logp.view(torch.int32))).sum())
        if bool(same.any()):
            largest = max(largest, float((my_logp.double() - logp.double())[same].abs().max()))
    return PathRuns(path, kernels, len(pairs), tokens, total, differing, largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="runs folder of one machine")
    parser.add_argument("b", type=Path, help="runs folder of another")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    try:
        result = compare(args.a, args.b)
    except QlabError as e:
        parser.error(str(e))
    for p in result.paths:
        print(f"{p.path:24} {p.runs:5} runs {p.logprobs:9} log-probabilities, {p.differing} differ, largest {p.largest:.3g}")
    print(f"{result.alone[0]} runs in {args.a} alone, {result.alone[1]} in {args.b} alone")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
