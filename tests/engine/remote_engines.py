"""Engines that a spawned process makes by name: they answer, fail, or end the process."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path as File

import torch

from qlab.engine.path import Path
from qlab.engine.run import Call, Request, Run, Scored
from qlab.errors import CheckpointError, UnsupportedError

VARIABLE = "QLAB_TEST_REMOTE"


@dataclass
class Told:
    """Answers with the variable that its process sees, in the notes; ``new_tokens`` chooses what else happens."""

    path: Path
    name: str = "builtin"
    dtype: torch.dtype = torch.float16
    directory: File = File("model")

    def run(self, request: Request, advance=lambda tokens: None) -> Run:
        print("asked for", request.new_tokens, flush=True)
        if request.new_tokens == 2:
            raise UnsupportedError("opaque: cuBLAS")
        if request.new_tokens == 3:
            raise RuntimeError("first line\nsecond line")
        if request.new_tokens == 4:
            os._exit(7)
        if request.new_tokens == 5:
            time.sleep(60)
        for _ in range(3):
            advance(2)
        tokens = torch.tensor([*request.prompts[0], 0])
        rows = len(tokens) - 1
        logprobs = torch.arange(rows, dtype=torch.float32)[:, None] - 1.5
        scored = Scored(tokens, len(request.prompts[0]), tokens[:rows, None], logprobs)
        notes = {"variable": os.environ.get(VARIABLE, "absent"), "process": str(os.getpid())}
        return Run((scored,), (), (Call("a", 1, "k", "replay", "", 1),), notes=notes)


def refuse(path: Path) -> Told:
    raise CheckpointError(f"no checkpoint for {path}")


def slow(path: Path) -> Told:
    time.sleep(60)
    return Told(path)
