"""An engine without a model: logits from random embeddings of the last two tokens, everything else as the interface has it."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass

import torch

from qlab.engine.path import Path
from qlab.engine.run import Call, Request, Row, Run, Scored, Tap, row_digest
from qlab.engine.schedule import size

LINEARS = ("model.layers.0.a", "model.layers.0.b")
WIDTH = {"model.layers.0.a": 8, "model.layers.0.b": 5}


@dataclass
class FakeEngine:
    """``shift`` moves one logit of every row, as another kernel would."""

    path: Path
    directory: object = None
    vocabulary: int = 2048
    shift: float = 0.0
    name: str = "builtin"
    native: bool = False
    dtype: torch.dtype = torch.float16

    def run(self, request: Request, advance=lambda tokens: None) -> Run:
        g = torch.Generator().manual_seed(1)
        # Small multiples of powers of two: every sum is exact, so that no order of summation can show.
        embedding = torch.randint(-16, 17, (self.vocabulary, 6), generator=g).double() / 8
        weights = {n: torch.randint(-8, 9, (6, w), generator=g).double() / 8 for n, w in WIDTH.items()}
        draw = torch.Generator().manual_seed(request.sampling.seed)
        fed = [len(p) + request.new_tokens - 1 for p in request.prompts]
        steps = request.batching.steps([len(p) for p in request.prompts], fed)
        place = {(s.sequence, t): (n, size(step)) for step in steps for n, (s, t) in enumerate(_tokens(step))}
        sequences, rows = [], []
        for i, prompt in enumerate(request.prompts):
            tokens, states, every = list(prompt), [], []
            for t in range(fed[i]):
                state = embedding[tokens[t]] + (embedding[tokens[t - 1]] / 2 if t else 0)
                states.append(state)
                logits = (embedding @ state).clone()
                logits[zlib.crc32(bytes([t % 256])) % self.vocabulary] += self.shift
                logp = logits.log_softmax(0).float()
                every.append(logp)
                if t + 1 == len(tokens):
                    tokens.append(self._next(request, i, t + 1 - len(prompt), logp, draw))
                advance(1)
            logp, x = torch.stack(every), torch.stack(states).half()
            y = {n: (x.double() @ w).half() for n, w in weights.items()}
            ids = torch.arange(self.vocabulary).expand(len(logp), -1)
            if request.top_k:
                ids = logp.sort(dim=1, descending=True, stable=True).indices[:, : request.top_k]
            if request.wanted is not None:
                ids = torch.cat([ids, request.wanted[i]], 1)
            digests = torch.stack([row_digest(y[n]) for n in LINEARS]) if request.digests else None
            sequences.append(Scored(torch.tensor(tokens), len(prompt), ids, logp.gather(1, ids), digests))
            for tap in sorted(t for t in request.taps if t.sequence == i):
                row, m = place[i, tap.position]
                rows.append(Row(Tap(*tap), row, m, "fake", x[tap.position], y[tap.linear][tap.position]))
        counts = Counter((n, size(step)) for step in steps for n in LINEARS)
        calls = tuple(Call(n, m, "fake", "replay", "", count) for (n, m), count in counts.items())
        return Run(tuple(sequences), steps, calls, tuple(rows), LINEARS, {"attention": "none"})

    def _next(self, request, i, n, logp, draw) -> int:
        if request.forced is not None:
            return request.forced[i][n]
        if request.sampling.temperature:
            return int(torch.multinomial((logp / request.sampling.temperature).softmax(0), 1, generator=draw))
        return int(logp.argmax())


def _tokens(step):
    return [(span, t) for span in step for t in range(span.start, span.stop)]
