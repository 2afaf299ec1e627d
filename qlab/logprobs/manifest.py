"""``trace.json``: what a trace says of itself, as frozen dataclasses, and its one spelling."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from qlab.engine.path import Path
from qlab.engine.run import Call
from qlab.engine.schedule import Batching
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import from_plain, to_plain

SCHEMA = "qlab.trace/1"
LARGEST = 64 * 2**20
"""Bytes of the longest manifest that is written or read."""
ORIGINS = ("native", "replay", "mixed", "unknown")
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Model:
    """The checkpoint that ran, by its content."""

    name: str
    """Last part of its directory."""
    method: str
    """``awq``, ``gptq``, ``compressed-tensors`` or ``unquantised``, as the checkpoint declares."""
    digest: str
    """sha256 over the names and sha256 of config.json and every safetensors file."""
    vocabulary: int
    """Token ids lie below it."""


@dataclass(frozen=True)
class Forced:
    """The recording whose tokens were imposed."""

    path: str
    """The generator's, as ``method@gpu``."""
    manifest: str
    """Digest of its manifest."""
    mode: str
    """``decode``: its generated tokens one by one; ``prefill``: all its tokens as a prompt."""


@dataclass(frozen=True)
class Asked:
    """The request, but for the token ids, which are tensors."""

    new_tokens: int
    batching: Batching
    temperature: float
    sampling_seed: int
    top_k: int
    """0: the whole vocabulary."""
    seed: int
    """Of the order of atomics in a replay."""
    imposed: bool
    """Whether the tokens after the prompts were given, not sampled."""
    forced: Forced | None = None
    """Where they came from, if from another trace."""


@dataclass(frozen=True)
class Lengths:
    """One sequence's sizes."""

    prompt: int
    tokens: int
    wanted: int
    """Log-probabilities per row beside the top-k."""


@dataclass(frozen=True)
class Tapped:
    """Place of a tapped row: see :class:`qlab.engine.run.Row`."""

    linear: str
    sequence: int
    position: int
    row: int
    M: int
    kernel: str


@dataclass(frozen=True)
class File:
    """A safetensors file of the trace."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything of a trace that is no tensor. ``files`` and ``digest`` are filled in by :func:`qlab.logprobs.trace.seal`."""

    engine: str
    method: str
    gpu: str
    dispatch: str
    origin: str
    """What computed the linears: ``native``, ``replay``, ``mixed``, or ``unknown`` where no call was reported."""
    dtype: str
    """Of the activations: ``float16`` or ``bfloat16``."""
    model: Model
    inputs: str
    """:func:`input_digest` of the prompts."""
    request: Asked
    sequences: tuple[Lengths, ...]
    calls: tuple[Call, ...]
    taps: tuple[Tapped, ...]
    linears: tuple[str, ...]
    digests: bool
    """Whether digests of every linear's output rows are kept."""
    notes: dict[str, str]
    environment: Environment
    files: tuple[File, ...] = ()
    digest: str = ""
    """sha256 of this manifest as it is written with an empty ``digest``."""
    schema: str = field(default=SCHEMA)

    @property
    def path(self) -> Path:
        """The path that computed the trace."""
        return Path(self.method, self.gpu, self.dispatch)  # type: ignore[arg-type]

    @property
    def columns(self) -> int:
        """Log-probabilities of the top-k per row."""
        return min(self.request.top_k or self.model.vocabulary, self.model.vocabulary)


def input_digest(prompts: tuple[tuple[int, ...], ...]) -> str:
    """sha256 over the prompts' token ids: per prompt its length, then its ids, as 8-byte little-endian numbers."""
    h = hashlib.sha256()
    for prompt in prompts:
        h.update(b"".join(n.to_bytes(8, "little") for n in (len(prompt), *prompt)))
    return h.hexdigest()


def sealed(m: Manifest) -> Manifest:
    """``m`` with the digest of its content."""
    return replace(m, digest=_digest(to_plain(m)))


def spell(m: Manifest) -> bytes:
    """The manifest's bytes. Raises QlabError where they would be more than a reader takes."""
    raw = _spell(to_plain(m))
    if len(raw) > LARGEST:
        raise QlabError(f"the trace's manifest would have {len(raw)} bytes, more than {LARGEST}; tap fewer rows")
    return raw


def parse(raw: bytes, where: str) -> Manifest:
    """Inverse of :func:`spell`: every byte must be the one that ``spell`` writes. Raises QlabError naming ``where``."""
    try:
        plain = json.loads(raw.decode("utf-8"))
        again = _spell(plain)
    except (ValueError, RecursionError) as e:
        raise QlabError(f"{where} is not JSON as a trace has it ({e}); copy the trace again") from None
    found = plain.get("schema") if isinstance(plain, dict) else None
    if found != SCHEMA:
        raise QlabError(f"{where} holds {found!r}, not {SCHEMA!r}; name a trace that this version of qlab can read")
    if again != raw or plain.get("digest") != _digest(plain):
        raise QlabError(f"{where} was damaged or edited: its digest does not fit its content; copy the trace again")
    m = from_plain(Manifest, plain, where)
    if m.request.batching.budget < 1 or m.request.batching.together < 1:
        raise QlabError(f"{where}: the batching holds a number below 1")
    for name, value, known in (("origin", m.origin, ORIGINS), ("dtype", m.dtype, DTYPES)):
        if value not in known:
            raise QlabError(f"{where}: {name} is {value!r}, not one of {', '.join(known)}")
    try:
        m.path  # noqa: B018 - its checks are wanted, not its value
    except QlabError as e:
        raise QlabError(f"{where}: {e}") from None
    return m


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(_spell({**plain, "digest": ""})).hexdigest()


def _spell(plain: Any) -> bytes:
    return (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()
