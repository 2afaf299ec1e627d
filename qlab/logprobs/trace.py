"""A trace: what an engine computed, as a directory of safetensors files and one manifest ``trace.json``.

``sequences.safetensors`` holds per sequence i ``i.tokens`` int32 [tokens], ``i.ids`` int32 [rows, k + wanted] (without the
first k where they are the whole vocabulary in order), ``i.logprobs`` float32 [rows, k + wanted], ``i.digests`` int64
[linears, rows] where they were asked for, and ``steps`` int64 [spans, 4]: step, sequence, start, stop. ``rows.safetensors``,
where rows were tapped, holds per linear ``x.NAME`` [taps, K] and ``y.NAME`` [taps, N] in the activations' dtype, in the order
of the manifest's taps.

Reading executes nothing: JSON and safetensors are data, and only plain files that the manifest names are opened. The manifest
has each file's size and sha256 and a digest of itself, so one changed byte anywhere is refused. That finds damage. It is no
signature: who forges a trace can compute the digests anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from qlab.engine.run import Run, Scored
from qlab.errors import QlabError
from qlab.logprobs import folder
from qlab.logprobs.manifest import LARGEST, SCHEMA, File, Manifest, parse, sealed, spell
from qlab.logprobs.tensors import pack_rows, pack_sequences, unpack_rows, unpack_sequences

MANIFEST = "trace.json"
SEQUENCES = "sequences.safetensors"
ROWS = "rows.safetensors"
NAMES = (MANIFEST, SEQUENCES, ROWS)


@dataclass(frozen=True, eq=False)
class Trace:
    """What an engine computed, with everything that is needed to compute it again."""

    manifest: Manifest
    run: Run

    @property
    def sequences(self) -> tuple[Scored, ...]:
        """One per prompt, in their order."""
        return self.run.sequences

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The prompts' token ids."""
        return tuple(tuple(s.tokens[: s.prompt].tolist()) for s in self.sequences)


def seal(trace: Trace) -> Trace:
    """The trace with its files' sizes and digests and its manifest's digest, as :func:`write` would write it.

    Raises QlabError naming the tensor where the run does not fit the manifest.
    """
    return _pack(trace)[0]


def write(trace: Trace, directory: Path, *, overwrite: bool = False) -> Trace:
    """Write the directory whole or not at all; returns the trace as it was sealed.

    A directory that exists is refused, unless it is a trace and ``overwrite`` is set. Raises QlabError naming it.
    """
    check_target(directory, overwrite)
    made, files = _pack(trace)
    folder.write(directory, files)
    return made


def check_target(directory: Path, overwrite: bool = False) -> None:
    """Raise QlabError where :func:`write` would refuse ``directory``, before any work is done."""
    folder.check_target(directory, overwrite, is_trace)


def is_trace(directory: Path) -> bool:
    """Whether a directory holds a trace's files and nothing else; they may be damaged."""
    found = folder.names(directory)
    if MANIFEST not in found or not found <= set(NAMES):
        return False
    try:
        return f'"schema": "{SCHEMA}"'.encode() in folder.read(directory / MANIFEST, most=LARGEST)
    except QlabError:
        return False


def read(directory: Path) -> Trace:
    """The trace in ``directory``.

    Raises QlabError naming the file that is missing, damaged, edited, a link, or no part of the trace, and the tensor that does
    not fit the manifest.
    """
    found = folder.names(directory)
    if MANIFEST not in found:
        raise QlabError(f"{directory / MANIFEST} is missing; name a trace's directory")
    m = parse(folder.read(directory / MANIFEST, most=LARGEST), str(directory / MANIFEST))
    expected = _names(m, directory)
    if extra := sorted(found - expected - {MANIFEST}):
        raise QlabError(f"{directory / extra[0]} is no part of the trace; remove it")
    files = {f.name: _whole(directory / f.name, f) for f in m.files}
    tensors = unpack_sequences(files[SEQUENCES], m, str(directory / SEQUENCES))
    rows = unpack_rows(files[ROWS], m, str(directory / ROWS)) if ROWS in files else ()
    run = Run(tensors.sequences, tensors.steps, m.calls, rows, m.linears, dict(m.notes))
    return Trace(m, run)


def _names(m: Manifest, directory: Path) -> set[str]:
    named = [f.name for f in m.files]
    for name in named:
        if not folder.NAME.fullmatch(name):
            raise QlabError(f"{directory / MANIFEST} names the file {name!r}; a trace's files lie in it, as NAME.safetensors")
    expected = {SEQUENCES} | ({ROWS} if m.taps else set())
    if set(named) != expected or len(named) != len(expected):
        raise QlabError(f"{directory / MANIFEST} names the files {', '.join(named)}, not {', '.join(sorted(expected))}")
    return expected


def _whole(path: Path, file: File) -> bytes:
    raw = folder.read(path, size=file.bytes)
    if hashlib.sha256(raw).hexdigest() != file.sha256:
        raise QlabError(f"{path} was damaged or edited: its sha256 is not the manifest's; copy the trace again")
    return raw


def _pack(trace: Trace) -> tuple[Trace, dict[str, bytes]]:
    m, run = trace.manifest, trace.run
    files = {SEQUENCES: pack_sequences(run, m)}
    if run.rows:
        files[ROWS] = pack_rows(run.rows)
    # What is written must be readable: the reader's checks run first, on the very bytes.
    unpack_sequences(files[SEQUENCES], m, SEQUENCES)
    if run.rows:
        unpack_rows(files[ROWS], m, ROWS)
    listed = tuple(File(name, hashlib.sha256(raw).hexdigest(), len(raw)) for name, raw in files.items())
    made = sealed(replace(m, files=listed))
    return Trace(made, run), {**files, MANIFEST: spell(made)}
