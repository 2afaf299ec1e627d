"""transformers' Llama in float64 around quantised linears that are called as vLLM fuses them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qlab.engine.attention import Cache, Placed
from qlab.engine.blocks import Blocks
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.lab.model_files import ModelFiles
from qlab.weights import round_once


class Watch(Protocol):
    """Sees every call of a linear."""

    def enter(self, linear: Linear, x: Tensor) -> Tensor:
        """The rows [M, K], in the weight's dtype, that the kernel shall get for x."""
        ...

    def leave(self, linear: Linear, x: Tensor, y: Tensor) -> None:
        """What the kernel got and gave."""
        ...


class Llama:
    """A decoder whose linears run on a path. Everything else is float64; each linear's input is rounded once to its dtype.

    Raises CheckpointError where directory and configuration do not make such a model.
    """

    def __init__(self, files: ModelFiles, path: Path, device: torch.device, native: bool | None) -> None:
        self.device = device
        self.blocks = Blocks(files, device)
        self._seed = 0
        self._watch: Watch | None = None
        made = [self.blocks.block(i, path, native, self.call) for i in range(self.blocks.depth)]
        self._layers = [b.module for b in made]
        self.linears: dict[str, Linear] = {linear.name: linear for b in made for linear in b.linears.values()}

    @property
    def vocabulary(self) -> int:
        """Token ids that the embedding has."""
        return self.blocks.vocabulary

    @property
    def longest(self) -> int:
        """Tokens that the positions, and attention without a sliding window, are made for."""
        return self.blocks.longest

    def cache(self, tokens: int) -> Cache:
        """Room for a sequence."""
        return self.blocks.cache(self.blocks.depth, tokens)

    @contextmanager
    def watched(self, watch: Watch, seed: int) -> Iterator[None]:
        """Linears report to ``watch`` and replay atomics with ``seed``; threads as :meth:`Blocks.threads`."""
        self._watch, self._seed = watch, seed
        try:
            with self.blocks.threads():
                yield
        finally:
            self._watch = None

    @torch.no_grad()
    def step(self, tokens: Sequence[int], spans: Sequence[Placed]) -> Tensor:
        """Log-probabilities [T, vocabulary], float64, of what follows each of ``tokens``, which belong to ``spans`` in turn."""
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(self.device)
        turned = self.blocks.turn(max(s.stop for s in spans))
        both = (turned[0][:, positions], turned[1][:, positions])
        hidden = self.blocks.embed(tokens)
        for layer in self._layers:
            out = layer(hidden, attention_mask=None, position_ids=positions[None], position_embeddings=both, spans=spans)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.blocks.logprobs(hidden)

    def call(self, linear: Linear, x: Tensor) -> Tensor:
        """y in float64 for float64 x [1, T, K]: rounded once, multiplied, widened."""
        rows = round_once(x[0], linear.dtype)
        if self._watch is not None:
            rows = self._watch.enter(linear, rows)
        y = linear.run(rows, self._seed)
        if self._watch is not None:
            self._watch.leave(linear, rows, y)
        return y.double()[None]
