"""Traces from engines: a recording, and the re-execution of a trace's tokens on another path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as Directory
from typing import Literal, get_args

import torch

from qlab import environment
from qlab.engine.run import Advance, Engine, Request, Run, Sampling, Tap
from qlab.engine.schedule import Batching
from qlab.errors import QlabError
from qlab.logprobs.manifest import Asked, Forced, Lengths, Manifest, Model, Tapped, input_digest
from qlab.logprobs.model import check_same, identify
from qlab.logprobs.trace import Trace, seal

Mode = Literal["decode", "prefill"]


def record(
    engine: Engine,
    request: Request,
    *,
    model: Model | None = None,
    forced: Forced | None = None,
    advance: Advance = lambda tokens: None,
) -> Trace:
    """Run ``request`` and seal what came out.

    ``model`` is :func:`qlab.logprobs.model.identify`'s answer for the engine's checkpoint; without one the engine's own
    ``directory`` is read. Raises UnsupportedError where the path cannot be computed here, QlabError where the run is not whole.
    """
    model = model or _identify(engine)
    return seal(Trace(_manifest(engine, request, model, forced, run := engine.run(request, advance)), run))


def re_execute(
    trace: Trace,
    engine: Engine,
    mode: Mode = "decode",
    *,
    model: Model | None = None,
    any_model: bool = False,
    batching: Batching | None = None,
    seed: int | None = None,
    advance: Advance = lambda tokens: None,
) -> Trace:
    """Impose a trace's tokens on ``engine`` and collect the same quantities: log-probabilities, digests, tapped rows.

    The result lists the engine's own top-k and behind them the generator's top-k ids. Batching is the trace's own unless
    another is given; ``decode`` feeds generated tokens one by one as the generator did, ``prefill`` as a part of the prompt.
    Raises QlabError where the engine's model is not known to be the trace's (:func:`qlab.logprobs.model.check_same`).
    """
    model = model or _identify(engine)
    check_same(trace.manifest.model, model, any_model=any_model)
    request = imposed(trace, mode)
    if batching is not None:
        request = replace(request, batching=batching)
    if seed is not None:
        request = replace(request, seed=seed)
    forced = Forced(str(trace.manifest.path), trace.manifest.digest or seal(trace).manifest.digest, mode)
    return record(engine, request, model=model, forced=forced, advance=advance)


def imposed(trace: Trace, mode: Mode) -> Request:
    """The request that imposes a trace's tokens: everything else as in the trace, its top-k ids wanted too."""
    if mode not in get_args(Mode):
        raise QlabError(f"mode {mode!r} is neither {' nor '.join(get_args(Mode))}")
    own, asked = again(trace), trace.manifest.request
    tokens = [tuple(s.tokens.tolist()) for s in trace.sequences]
    split = [len(t) - 1 if mode == "prefill" else s.prompt for t, s in zip(tokens, trace.sequences, strict=True)]
    k = trace.manifest.columns
    return replace(
        own,
        prompts=tuple(t[:n] for t, n in zip(tokens, split, strict=True)),
        new_tokens=1 if mode == "prefill" else asked.new_tokens,
        forced=tuple(t[n:] for t, n in zip(tokens, split, strict=True)),
        wanted=tuple(s.ids[:, :k] for s in trace.sequences) if asked.top_k else None,
    )


def again(trace: Trace) -> Request:
    """The request that a trace answered."""
    m, asked = trace.manifest, trace.manifest.request
    wanted = tuple(s.ids[:, m.columns :] for s in trace.sequences)
    return Request(
        prompts=trace.prompts,
        new_tokens=asked.new_tokens,
        forced=tuple(tuple(s.tokens[s.prompt :].tolist()) for s in trace.sequences) if asked.imposed else None,
        batching=asked.batching,
        sampling=Sampling(asked.temperature, asked.sampling_seed),
        top_k=asked.top_k,
        wanted=wanted if any(w.shape[1] for w in wanted) else None,
        taps=frozenset(Tap(t.linear, t.sequence, t.position) for t in m.taps),
        digests=m.digests,
        seed=asked.seed,
    )


def fed(request: Request) -> int:
    """Tokens that a request feeds to the model, for a progress bar: the last one of a sequence is only chosen."""
    return sum(len(p) + request.new_tokens - 1 for p in request.prompts)


def _identify(engine: Engine) -> Model:
    directory = getattr(engine, "directory", None)
    if directory is None:
        raise QlabError(f"engine {engine.name} does not say which checkpoint it runs; name it with model=")
    return identify(Directory(directory))


def _manifest(engine: Engine, request: Request, model: Model, forced: Forced | None, run: Run) -> Manifest:
    k = min(request.top_k or model.vocabulary, model.vocabulary)
    origins = {c.origin for c in run.calls}
    return Manifest(
        engine=engine.name,
        method=engine.path.method,
        gpu=engine.path.gpu,
        dispatch=engine.path.dispatch,
        origin="unknown" if not origins else origins.pop() if len(origins) == 1 else "mixed",
        dtype=_dtype(engine, run),
        model=model,
        inputs=input_digest(request.prompts),
        request=Asked(
            new_tokens=request.new_tokens,
            batching=request.batching,
            temperature=float(request.sampling.temperature),
            sampling_seed=request.sampling.seed,
            top_k=request.top_k,
            seed=request.seed,
            imposed=request.forced is not None,
            forced=forced,
        ),
        sequences=tuple(Lengths(s.prompt, len(s.tokens), s.ids.shape[1] - k) for s in run.sequences),
        calls=run.calls,
        taps=tuple(Tapped(*r.tap, r.row, r.M, r.kernel) for r in run.rows),
        linears=run.linears,
        digests=request.digests,
        notes=dict(run.notes),
        environment=environment.collect(details=False),
    )


def _dtype(engine: Engine, run: Run) -> str:
    found = run.rows[0].x.dtype if run.rows else getattr(engine, "dtype", torch.float16)
    return str(found).removeprefix("torch.")
