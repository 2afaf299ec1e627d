"""An engine from options that were typed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as Directory

import torch

from qlab import data
from qlab.command import torch_dtype
from qlab.engine.path import Path
from qlab.engine.run import Engine
from qlab.engine.schedule import Batching
from qlab.errors import QlabError, UnsupportedError

ENGINES = ("builtin", "vllm")


@dataclass(frozen=True)
class Choice:
    """A model on a path, and what runs it."""

    directory: Directory
    path: Path
    device: torch.device
    engine: str = "builtin"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Raises QlabError naming the option."""
        if self.engine not in ENGINES:
            raise QlabError(f"--engine {self.engine!r} is neither {' nor '.join(ENGINES)}")
        torch_dtype(self.dtype)

    @contextmanager
    def running(self, batching: Batching) -> Iterator[Engine]:
        """The engine for requests of that batching; a process of its own ends with the context."""
        engine = self.make(batching)
        try:
            yield engine
        finally:
            if close := getattr(engine, "close", None):
                close()

    def make(self, batching: Batching) -> Engine:
        """The engine, its model loaded; vLLM's is told the batching when it starts, in a process of its own.

        Raises UnsupportedError where it cannot run here.
        """
        dtype = torch_dtype(self.dtype)
        if self.engine == "builtin":
            from qlab.engine.builtin import Builtin

            return Builtin(self.directory, self.path, self.device, dtype=dtype)
        if self.device.type != "cuda":
            raise UnsupportedError("--engine vllm needs a CUDA GPU; leave the option out to replay its kernels on the CPU")
        try:
            from qlab.engine.vllm import remote
        except ImportError as e:
            raise UnsupportedError(f"--engine vllm: vLLM cannot be imported ({e}); pip install 'qlab[vllm]'") from None
        return remote(self.directory, self.path, batching, dtype=dtype)


def default_directory(path: Path) -> Directory:
    """The shipped checkpoint that a path runs; GPTQ's where it takes either."""
    return data.model_directory("awq" if path.source == "awq" else "gptq")
