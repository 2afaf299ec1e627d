"""Runs with known distances: every log-probability of a path lies off a common base by the path's offset."""

from __future__ import annotations

import torch

from qlab import environment
from qlab.engine.path import Path
from qlab.engine.run import Call, Scored
from qlab.logprobs.tables import SCHEMA, Cells, Dispatched, ExperimentResult, Prompts
from qlab.logprobs.tabulate import tabulate

K, NEW = 5, 4
METHODS = ("awq", "awq_marlin", "gptq", "gptq_marlin")
OFFSET = {"awq": 0.0, "awq_marlin": 0.125, "gptq": 4.0, "gptq_marlin": 4.5}
"""Binary fractions, so that differences are exact."""
STEP = {"a100": 0.0, "h100": 0.0625, "h200": 0.0625}
"""What a GPU adds to Marlin's."""
REASON = "opaque: cuBLAS"


def tokens_of(path, s):
    """gptq's generated tokens differ from awq's, and gptq_marlin's on prompt 0 from gptq's."""
    t = list(range(s, s + 6 + 2 * s + NEW))
    if path.method.startswith("gptq"):
        t[-2] += 100
    if path.method == "gptq_marlin" and s == 0:
        t[-1] += 200
    return t


def scored(path, tokens, prompt, extra=0.0):
    rows = len(tokens) - 1
    base = torch.arange(K).flip(0).expand(rows, K) * 0.25 - 8.0
    offset = OFFSET[path.method] + (STEP[path.gpu] if "marlin" in path.method else 0.0) + extra
    ids = (torch.tensor(tokens[:-1])[:, None] + torch.arange(K) * 7) % 1000
    return Scored(torch.tensor(tokens), prompt, ids, (base + offset).float())


def cells(paths, prompts=8, refused=()):
    c = Cells()
    sequences = {p: [tokens_of(p, s) for s in range(prompts)] for p in paths}
    for p in paths:
        mine = sequences[p]
        noise = 0.03125 if p.method == "gptq" else 0.0
        split = [[*t[:-1], t[-1] + 1] if p.method == "gptq" and s < 2 else t for s, t in enumerate(mine)]
        c.recordings[p] = REASON if p in refused else tuple(scored(p, t, len(t) - NEW) for t in mine)
        c.again[p] = REASON if p in refused else tuple(scored(p, t, len(t) - NEW, noise) for t in split)
        c.prefill_again[p] = REASON if p in refused else tuple(scored(p, t, len(t) - 1, noise) for t in mine)
        for name, moved in (("whole", 0.25), ("token by token", 0.0)):
            extra = moved if "marlin" in p.method else 0.0
            c.batches[p, name] = REASON if p in refused else tuple(scored(p, t, len(t) - 1, extra) for t in mine)
        for r in paths:
            no = p in refused or r in refused
            c.prefill[p, r] = REASON if no else tuple(scored(r, t, len(t) - 1) for t in mine)
            c.decode[p, r] = REASON if no else tuple(scored(r, t, len(t) - NEW) for t in mine)
    return c


def result(gpus=("a100", "h100"), methods=METHODS, prompts=8, refused=()):
    paths = [Path(m, g) for g in gpus for m in methods]
    gone = [p for p in paths if str(p) in refused]
    call = Call("model.layers.0.mlp.down_proj", 50, "vllm.marlin.awq", "replay", "ab12", 8)
    return ExperimentResult(
        SCHEMA,
        {"hw": ",".join(gpus)},
        environment.collect(details=False),
        "builtin",
        ("model/awq [one], digest 0123", "model/gptq, digest 4567"),
        Prompts(prompts, 99, NEW, "ab" * 32),
        K,
        tuple(Dispatched(str(p), () if p in gone else (call,), REASON if p in gone else "") for p in paths),
        tabulate(cells(paths, prompts, gone), paths, top_k=K),
        1.5,
        {},
    )
