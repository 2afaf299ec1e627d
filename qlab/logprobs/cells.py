"""Runs that an experiment is made of, each computed once and kept on disk, so that an interrupted experiment goes on.

A run is one sequence under one engine. Its key is a digest of everything that decides its numbers: model, engine, path, dtype,
tokens, schedule, sampling. Whoever asks for the same run again, under whatever name, gets the kept one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import qlab
from qlab.backends import dispatch, registry
from qlab.engine.path import Path
from qlab.engine.run import Advance, Call, Engine, Request, Scored
from qlab.errors import QlabError, UnsupportedError
from qlab.serial import from_plain, to_plain, write_whole

SCHEMA = "qlab.logprobs.run/1"
PARTS = ("tokens", "ids", "logprobs")
Sequences = tuple[Scored, ...]


@dataclass(frozen=True, eq=False)
class Bench:
    """One path's engine with the name of what it runs."""

    engine: Engine
    model: str
    """Digest of the checkpoint."""
    variant: str = ""
    """What else distinguishes the engine: flipped attention outputs, an attention backend."""

    @property
    def native(self) -> bool:
        """Whether kernels run natively, or may do so."""
        return bool(getattr(self.engine, "native", True))

    @property
    def repeats(self) -> bool:
        """Whether a second run could give other bits: a kernel that runs natively, or atomics in another order."""
        return self.native or not _ordered(self.engine.path)


def _ordered(path: Path) -> bool:
    """Whether every kernel that the path may run adds in a fixed order."""
    return all(registry.kernel(name).repeatable for name in dispatch.KERNELS.get(path.method, (path.method,)))


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished run: one sequence, and the calls of its batch (kept with the batch's first sequence)."""

    path: str
    scored: Scored
    calls: tuple[Call, ...]


@dataclass
class Store:
    """Finished runs: in memory, and in a folder where one is named."""

    folder: File | None = None
    _known: dict[str, Kept] = field(default_factory=dict)

    def run(self, bench: Bench, request: Request, advance: Advance = lambda tokens: None) -> Sequences:
        """The request's sequences, without digests: rows of linears are not kept. With one sequence in the batch at a time each
        is a run of its own, computed once.

        Raises UnsupportedError where the path cannot be computed here.
        """
        request = replace(request, taps=frozenset(), digests=False)
        if request.batching.together > 1:
            return self._some(bench, request, advance)
        return tuple(self._some(bench, _alone(request, i), advance)[0] for i in range(len(request.prompts)))

    def _some(self, bench: Bench, request: Request, advance: Advance) -> Sequences:
        keys = [self._key(bench, request, i) for i in range(len(request.prompts))]
        found = [k.scored for key in keys if (k := self._find(key))]
        if len(found) == len(keys):
            advance(sum(len(scored.tokens) - 1 for scored in found))
            return tuple(found)
        made = bench.engine.run(request, advance)
        for i, (key, scored) in enumerate(zip(keys, made.sequences, strict=True)):
            self._keep(key, Kept(str(bench.engine.path), scored, made.calls if i == 0 else ()))
        return made.sequences

    def _key(self, bench: Bench, request: Request, sequence: int) -> str:
        wanted = None if request.wanted is None else [_hash(w) for w in request.wanted]
        sampled = request.forced is None and request.sampling.temperature > 0
        parts = {
            "qlab": qlab.__version__,
            "model": bench.model,
            "engine": bench.engine.name,
            "variant": bench.variant,
            "path": str(bench.engine.path),
            "dtype": str(getattr(bench.engine, "dtype", "")),
            "native": bench.native,
            "prompts": request.prompts,
            "forced": request.forced,
            "new_tokens": request.new_tokens,
            "batching": [request.batching.budget, request.batching.together],
            "sampling": [request.sampling.temperature, request.sampling.seed] if sampled else None,
            "top_k": request.top_k,
            "wanted": wanted,
            "seed": request.seed if bench.repeats else 0,
            "sequence": sequence,
            "first": request.first if sampled or bench.variant else 0,
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _find(self, key: str) -> Kept | None:
        if key in self._known or self.folder is None:
            return self._known.get(key)
        try:
            with safe_open(self.folder / f"{key}.safetensors", "pt") as f:
                run, digest = (f.metadata()[name] for name in ("run", "sha256"))
                parts = [f.get_tensor(name) for name in PARTS]
            if digest != _digest(key, run, parts):
                return None
            about = json.loads(run)
            calls = tuple(from_plain(Call, c) for c in about["calls"])
            found = Kept(about["path"], Scored(parts[0], about["prompt"], parts[1], parts[2]), calls)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # absent or damaged: it is computed again
            return None
        self._known[key] = found
        return found

    def _keep(self, key: str, kept: Kept) -> None:
        self._known[key] = kept
        if self.folder is None:
            return
        s = kept.scored
        run = json.dumps({"path": kept.path, "prompt": s.prompt, "calls": to_plain(kept.calls)})
        tensors = {name: t.cpu().contiguous() for name, t in zip(PARTS, (s.tokens, s.ids, s.logprobs), strict=True)}
        about = {"schema": SCHEMA, "run": run, "sha256": _digest(key, run, list(tensors.values()))}
        write_whole(self.folder / f"{key}.safetensors", save(tensors, metadata=about))

    def called(self, path: str) -> tuple[Call, ...]:
        """Every kind of call that the runs on a path made, in the order of linears and M."""
        counts: dict[Call, int] = {}
        for kept in self._known.values():
            for c in kept.calls if kept.path == path else ():
                kind = replace(c, count=0)
                counts[kind] = counts.get(kind, 0) + c.count
        return tuple(replace(c, count=n) for c, n in sorted(counts.items(), key=lambda item: (item[0].linear, item[0].M)))


def _alone(request: Request, i: int) -> Request:
    forced = None if request.forced is None else (request.forced[i],)
    wanted = None if request.wanted is None else (request.wanted[i],)
    return replace(request, prompts=(request.prompts[i],), forced=forced, wanted=wanted, first=request.first + i)


def _hash(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


def _digest(key: str, run: str, parts: Sequence[Tensor]) -> str:
    """Of a kept run with its key: safetensors checks its header alone."""
    h = hashlib.sha256(f"{key} {run}".encode())
    for t in parts:
        h.update(f"{t.dtype} {tuple(t.shape)} {_hash(t)}".encode())
    return h.hexdigest()


def attempt(work: Callable[[], Sequences]) -> Sequences | str:
    """What ``work`` gives, or why it cannot be had here."""
    try:
        return work()
    except UnsupportedError as e:
        return str(e)


def prefill_of(sequences: Sequence[Scored], request: Request) -> Request:
    """Re-execution that prefills prompt and generated tokens alike: the same rows, as a verifier would compute them."""
    tokens = [s.tokens.tolist() for s in sequences]
    return replace(request, prompts=tuple(tuple(t[:-1]) for t in tokens), new_tokens=1, forced=tuple((t[-1],) for t in tokens))


def decode_of(sequences: Sequence[Scored], request: Request) -> Request:
    """Re-execution that prefills the prompts and decodes the generated tokens one by one."""
    tokens = [s.tokens.tolist() for s in sequences]
    lengths = {len(s.tokens) - s.prompt for s in sequences}
    if len(lengths) != 1:
        raise QlabError(f"the sequences have {sorted(lengths)} generated tokens; one request needs one number of them")
    split = [(tuple(t[: s.prompt]), tuple(t[s.prompt :])) for s, t in zip(sequences, tokens, strict=True)]
    return replace(request, prompts=tuple(p for p, _ in split), new_tokens=lengths.pop(), forced=tuple(f for _, f in split))
