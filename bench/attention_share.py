"""How many of attention's outputs another attention kernel of vLLM changes on this GPU, layer by layer.

    python -m bench.attention_share --hw h200 --against TRITON_ATTN --json results/h200/attention-share.json

In the first layer both kernels get the same bits, so what differs there is attention alone; later layers inherit. The share of
the first layer is the place of this pair of kernels on the curve of ``python -m qlab.logprobs causes``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path as File

import torch
from torch import Tensor

from qlab import environment
from qlab.data import model_directory
from qlab.engine.path import Path
from qlab.engine.run import Request, Run, Tap
from qlab.engine.schedule import Batching
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.logprobs import prompts, taps
from qlab.serial import write_json

SCHEMA = "qlab.attention-share/1"


@dataclass(frozen=True)
class LayerShare:
    layer: str
    elements: int
    differing: int
    """Elements of o_proj's input with other bits."""
    one_ulp: int
    """Of these, neighbouring numbers."""


@dataclass(frozen=True)
class AttentionShare:
    schema: str
    environment: Environment
    path: str
    backends: tuple[str, ...]
    """As the engines report them."""
    prompts: int
    tokens: int
    layers: tuple[LayerShare, ...]


def ordered(t: Tensor) -> Tensor:
    """int32: numbers of a 16-bit dtype in ascending order, so that neighbours differ by 1; both zeros are 0."""
    bits = t.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def shares(a: Run, b: Run, layers: list[str]) -> tuple[LayerShare, ...]:
    """Tapped inputs of two runs over the same tokens, compared. Raises QlabError where one lacks a row."""
    found = []
    for name in layers:
        mine, other = ({r.tap: r.x for r in run.rows if r.tap.linear == name} for run in (a, b))
        if mine.keys() != other.keys() or not mine:
            raise QlabError(f"{name}: the two engines kept other rows")
        x, y = (torch.stack([rows[tap] for tap in sorted(mine)]) for rows in (mine, other))
        apart = (ordered(x) - ordered(y)).abs()
        found.append(LayerShare(name, x.numel(), int((apart > 0).sum()), int((apart == 1).sum())))
    return tuple(found)


def main() -> None:
    from qlab.engine.vllm import remote

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hw", default="h100", help="key of this GPU in qlab's table")
    parser.add_argument("--method", default="awq_marlin")
    parser.add_argument("--against", default="TRITON_ATTN", help="vLLM's name of the other attention backend")
    parser.add_argument("--model", type=File, help="checkpoint; the shipped one by default")
    parser.add_argument("--json", type=File, required=True)
    args = parser.parse_args()
    path = Path(args.method, args.hw)
    directory = args.model or model_directory("awq" if path.source == "awq" else "gptq")
    given = prompts.heldout(directory)
    layers = [name for name in taps.linear_names(directory) if name.endswith(".o_proj")]
    wanted = frozenset(Tap(name, s, i) for name in layers for s, p in enumerate(given) for i in range(len(p)))
    request = Request(given, 1, batching=Batching(50), taps=wanted)
    with (
        remote(directory, path, Batching(50)) as own,
        remote(directory, path, Batching(50), attention_backend=args.against) as other,
    ):
        a, b = own.run(request), other.run(request)
    backends = (a.notes["attention"], b.notes["attention"])
    found = shares(a, b, layers)
    tokens = sum(map(len, given))
    write_json(args.json, AttentionShare(SCHEMA, environment.collect(False), str(path), backends, len(given), tokens, found))
    for s in found:
        print(f"{s.layer}: {s.differing} of {s.elements} ({s.differing / s.elements:.2%}), {s.one_ulp} by one unit")


if __name__ == "__main__":
    main()
