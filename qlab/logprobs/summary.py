"""What a trace holds, in a few lines."""

from __future__ import annotations

from dataclasses import dataclass

from qlab.engine.schedule import Batching
from qlab.environment import Environment
from qlab.logprobs.manifest import Forced, Model
from qlab.logprobs.trace import Trace

SCHEMA = "qlab.logprobs.summary/1"


@dataclass(frozen=True)
class Used:
    """One kernel, over every linear that it computed."""

    kernel: str
    origin: str
    linears: int
    calls: int
    tokens: tuple[int, ...]
    """Each M that it saw, ascending."""
    recipes: tuple[str, ...]
    """Hashes of its recipes: one per shape and M where they differ."""


@dataclass(frozen=True)
class Summary:
    """The manifest without its lists of files, taps and calls."""

    path: str
    engine: str
    origin: str
    dtype: str
    model: Model
    prompts: tuple[int, ...]
    """Tokens of each prompt."""
    new_tokens: int
    top_k: int
    batching: Batching
    temperature: float
    forced: Forced | None
    kernels: tuple[Used, ...]
    rows: int
    """Tapped rows."""
    digests: bool
    notes: dict[str, str]
    environment: Environment
    bytes: int
    """Of the tensors' files."""
    inputs: str
    digest: str
    schema: str = SCHEMA


def summarise(trace: Trace) -> Summary:
    """The trace's summary."""
    m = trace.manifest
    kinds = dict.fromkeys((c.kernel, c.origin) for c in m.calls)
    kernels = []
    for kernel, origin in kinds:
        mine = [c for c in m.calls if (c.kernel, c.origin) == (kernel, origin)]
        kernels.append(
            Used(
                kernel,
                origin,
                len({c.linear for c in mine}),
                sum(c.count for c in mine),
                tuple(sorted({c.M for c in mine})),
                tuple(sorted({c.recipe for c in mine if c.recipe})),
            )
        )
    return Summary(
        path=str(m.path),
        engine=m.engine,
        origin=m.origin,
        dtype=m.dtype,
        model=m.model,
        prompts=tuple(n.prompt for n in m.sequences),
        new_tokens=m.request.new_tokens,
        top_k=m.request.top_k,
        batching=m.request.batching,
        temperature=m.request.temperature,
        forced=m.request.forced,
        kernels=tuple(kernels),
        rows=len(m.taps),
        digests=m.digests,
        notes=m.notes,
        environment=m.environment,
        bytes=sum(f.bytes for f in m.files),
        inputs=m.inputs,
        digest=m.digest,
    )
