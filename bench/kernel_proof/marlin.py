"""``cuda.marlin`` against vLLM's ``marlin_gemm``: in one process, then in a second one where vLLM is not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

from bench.kernel_proof import saved
from bench.kernel_proof.inputs import Trial, activations, weight
from bench.kernel_proof.place import Place
from bench.kernel_proof.saved import Record, Saved
from bench.kernel_proof.tally import Tally
from qlab.backends.registry import Packed, Problem
from qlab.compare import differing
from qlab.serial import write_json
from qlab.weights import Int4Weight

OURS = "cuda.marlin"
EDGES = (1, 8, 9, 16, 17, 48, 64, 65, 100, 128, 200, 256, 512, 1000, 2, 4, 15, 32, 33, 49, 63, 127, 129, 320, 1023, 1024, 1100)
"""M at which a tile, a launch or a kernel changes."""
DEPTHS = (128, 256, 384, 512, 640, 1024, 1152, 2048, 2176, 3072, 4096, 5120)
COLUMNS = (64, 128, 192, 256, 320, 512, 704, 1024, 1536, 2048, 2304, 3072, 4096, 4160, 4352, 4480, 6144, 8128, 8192)
LAYERS = ((4096, 6144), (4096, 4096), (14336, 4096), (3584, 4608), (18944, 3584), (4096, 28672), (8192, 10240))
"""K and N of layers of Llama-3-8B, Qwen2.5-7B and Llama-70B."""
GROUPS, FORMS, DTYPES, VALUES = (128, 32, 64, -1), ("awq", "gptq", "act_order"), ("fp16", "bf16"), ("plain", "cancel", "wide")
MOST, LARGEST = 1 << 24, 1100
"""Elements of a weight that is not a real layer's, and rows."""
SHARED = 6
"""Problems of one weight."""
REAL = 9
"""Every so-many-th weight is a real layer's."""
FIRST_SHARE = 0.55
"""Of the time for the first process."""
ASSET, SMALL = 64, 1 << 29
"""Problems, about, whose digests are kept for the tests, and products of the largest."""
WITH_BITS = 16


def trials(count: int) -> Iterator[Trial]:
    """Six M on each weight; every 24 weights see each form, dtype and group."""
    random = np.random.default_rng(6)
    edges, layers = cycle(EDGES), cycle(LAYERS)
    for i in range(-(-count // SHARED)):
        if i % REAL == REAL - 1:
            k, n = next(layers)
        else:
            k, n = int(random.choice(DEPTHS)), int(random.choice(COLUMNS))
            while k * n > MOST:
                k, n = int(random.choice(DEPTHS)), int(random.choice(COLUMNS))
        group = GROUPS[i // 6 % 4]
        form = FORMS[i % 3]
        if form == "act_order" and group in (-1, k):
            group = 64
        values = VALUES[int(random.integers(3))]
        most = LARGEST if k * n <= MOST else 300
        rows: list[int] = []
        while len(rows) < min(SHARED, count - SHARED * i):
            m = next(edges) if len(rows) < 4 else int(random.integers(1, most + 1))
            rows += [m] * (m not in rows)
        for m in rows:
            yield Trial(m, k, n, group, DTYPES[i // 3 % 2], form, values, i)


def prove(place: Place, tally: Tally, out: Path, check: saved.Check = saved.in_another_process) -> None:
    """Writes vLLM's outputs to ``out`` as digests, and some of them beside it (``*-small.json``) for the tests."""
    claim = "vLLM's marlin_gemm"
    records: list[Record] = []
    planned = list(trials(place.problems))
    ours = place.kernel(OURS)
    tally.kernels[OURS] = ours.version()
    other, stored = place.kernel("cuda.split"), 0
    held: tuple[Trial, Int4Weight, Packed, Packed] | None = None
    for number, trial in enumerate(planned):
        if place.over(FIRST_SHARE):
            tally.skip(f"{claim}: no time left", len(planned) - number)
            break
        theirs = place.kernel(f"vllm.marlin.{'awq' if trial.form == 'awq' else 'gptq'}")
        with tally.guard(claim, trial):
            if held is None or held[0] != trial.rows(0):
                held = None
                w = weight(trial, place.device)
                for kernel in (ours, theirs):
                    support = kernel.supports(Problem.of(w, trial.M), place.device)
                    if not support.ok:
                        raise RuntimeError(f"{kernel.name}: {support.reason}")
                held = trial.rows(0), w, ours.pack(w), theirs.pack(w)
                tally.kernels.setdefault(theirs.name, theirs.version())
            _, w, packed, their_packed = held
            x = activations(trial, place.device)
            want = theirs.run(x, their_packed)
            y = place.run(ours, x, packed)
            tally.compare(claim, trial, y, want)
            made = saved.record(trial, x, w, want, stored < WITH_BITS)
            stored += bool(made.bits)
            records.append(made)
            if trial.values == "cancel" and trial.M <= 64:
                changed = differing(place.run(other, x, packed), want)
                tally.fact("outputs of sums that cancel", want.numel())
                tally.fact("of these, outputs that the order of cuda.split changes", changed)
    said = Saved(saved.SCHEMA, place.gpu.key, tally.kernels.get("vllm.marlin.awq", ""), tuple(records))
    write_json(out, said)
    write_json(out.with_name(f"{out.stem}-small.json"), Saved(said.schema, said.gpu, said.source, small(records)))
    whole = not tally.left_out
    tally.write(now=True)
    part = out.with_name(f".{out.stem}-second.json")
    arguments = ["--kernel", OURS, "--claim", "saved outputs, vLLM not loaded"]
    saved.take_in(tally, part, check(out, part, arguments, place.left))
    part.unlink(missing_ok=True)
    tally.complete = whole and not tally.left_out


def small(records: list[Record]) -> tuple[Record, ...]:
    """Of each dtype and form as many, from the cheapest problem to one of SMALL products."""
    kinds: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: (r.trial.products, str(r.trial))):
        if r.trial.products <= SMALL:
            kinds.setdefault((r.trial.dtype, r.trial.form), []).append(r)
    each = -(-ASSET // max(1, len(kinds)))
    places = {kind: sorted({i * (len(found) - 1) // max(1, each - 1) for i in range(each)}) for kind, found in kinds.items()}
    return tuple(kinds[kind][i] for kind, chosen in places.items() for i in chosen)
