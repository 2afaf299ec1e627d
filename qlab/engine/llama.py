"""transformers' Llama in float64 around quantised linears that are called as vLLM fuses them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from qlab.checkpoint.llama import shard_names
from qlab.engine import attention
from qlab.engine.attention import Cache, Placed
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.errors import CheckpointError
from qlab.lab.activations import TAPS
from qlab.lab.model_files import ModelFiles
from qlab.lab.transformer import build, load, need, read_config, rotary, widen_norms
from qlab.weights import round_once

WIDE = 1 << 26
"""Elements of the head in float64 at once (512 MiB); a smaller head stays widened."""


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
        directory = files.directory
        config = read_config(directory)
        attention.register()
        self.directory, self.device, self.config = directory, device, config
        self._body = build(directory, config, attention.NAME).model.eval()
        self.linears: dict[str, Linear] = {}
        self._seed = 0
        self._watch: Watch | None = None
        for index, layer in enumerate(self._body.layers):
            for tap in TAPS:
                linear = self._linear(layer, f"model.layers.{index}.{tap}", tap, files, path, native)
                self.linears[linear.name] = linear
            load(layer, f"model.layers.{index}.", files.dense, directory, device)
            widen_norms(layer)
        load(self._body.norm, "model.norm.", files.dense, directory, device)
        widen_norms(self._body.norm)
        self._embedding = self._matrix(files, "model.embed_tokens.weight")
        tied = getattr(config, "tie_word_embeddings", False)
        self._head = self._embedding if tied else self._matrix(files, "lm_head.weight")
        if self._head.numel() <= WIDE:
            self._head = self._head.double()
        self._rotary = rotary(self._body, config, 0)

    @property
    def vocabulary(self) -> int:
        """Token ids that the embedding has."""
        return len(self._embedding)

    @property
    def longest(self) -> int:
        """Tokens that the positions, and attention without a sliding window, are made for."""
        most = int(self.config.max_position_embeddings)
        window = getattr(self.config, "sliding_window", None)
        return most if window is None else min(most, int(window))

    def cache(self, tokens: int) -> Cache:
        """Room for a sequence."""
        first = self._body.layers[0].self_attn
        heads = int(self.config.num_key_value_heads)
        return Cache.empty(len(self._body.layers), heads, tokens, int(first.head_dim), self.device)

    @contextmanager
    def watched(self, watch: Watch, seed: int) -> Iterator[None]:
        """Linears report to ``watch`` and replay atomics with ``seed``.

        On a CPU, PyTorch keeps to one thread around a small model: more save nothing there, cost tenfold where others use the
        cores, and could sum in another order. The replay's own threads stay.
        """
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and self._head.dtype == torch.float64:
            torch.set_num_threads(1)
        self._watch, self._seed = watch, seed
        try:
            yield
        finally:
            self._watch = None
            torch.set_num_threads(threads)

    @torch.no_grad()
    def step(self, tokens: Sequence[int], spans: Sequence[Placed]) -> Tensor:
        """Log-probabilities [T, vocabulary], float64, of what follows each of ``tokens``, which belong to ``spans`` in turn."""
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(self.device)
        turned = self._turn(max(s.stop for s in spans))
        both = (turned[0][:, positions], turned[1][:, positions])
        hidden = self._embedding[torch.tensor(tokens, device=self.device)].double()[None]
        for layer in self._body.layers:
            out = layer(hidden, attention_mask=None, position_ids=positions[None], position_embeddings=both, spans=spans)
            hidden = out[0] if isinstance(out, tuple) else out
        return self._logits(self._body.norm(hidden)[0]).log_softmax(-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._head.dtype == torch.float64:
            return hidden @ self._head.t()
        rows = max(1, WIDE // self._head.shape[1])
        return torch.cat([hidden @ part.double().t() for part in self._head.split(rows)], -1)

    def _turn(self, tokens: int) -> tuple[Tensor, Tensor]:
        if self._rotary[0].shape[1] < tokens:
            count = min(self.longest, max(256, 2 * tokens))
            cosine, sine = rotary(self._body, self.config, count)
            self._rotary = cosine.to(self.device), sine.to(self.device)
        return self._rotary

    def _matrix(self, files: ModelFiles, name: str) -> Tensor:
        found = need(files.dense(name), self.directory, name)
        want = [int(self.config.vocab_size), int(self.config.hidden_size)]
        if list(found.shape) != want:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is {list(found.shape)}, config.json asks for {want}; "
                "the two belong to different models"
            )
        return found.to(self.device)

    def _linear(self, layer: nn.Module, name: str, tap: str, files: ModelFiles, path: Path, native: bool | None) -> Linear:
        """Put the fused linear ``name`` in place of its modules in ``layer``."""
        weight = files.weight(name)
        modules = [cast(nn.Linear, layer.get_submodule(shard)) for shard in shard_names(tap)]
        columns = [m.out_features for m in modules]
        found, want = [weight.K, weight.N], [modules[0].in_features, sum(columns)]
        if found != want:
            raise CheckpointError(
                f"{self.directory}: linear {name!r} is {found}, config.json asks for {want}; the two belong to different models"
            )
        bias = None
        if modules[0].bias is not None:
            parts = [need(files.dense(f"{shard}.bias"), self.directory, f"{shard}.bias") for shard in shard_names(name)]
            bias = round_once(torch.cat(parts).double(), weight.dtype)
        linear = Linear(weight, path, self.device, native=native, bias=bias)
        fused = _Fused(self, linear, columns)
        for i, shard in enumerate(shard_names(tap)):
            parent, _, leaf = shard.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, _Shard(fused, i))
        return linear

    def call(self, linear: Linear, x: Tensor) -> Tensor:
        """y in float64 for float64 x [1, T, K]: rounded once, multiplied, widened."""
        rows = round_once(x[0], linear.dtype)
        if self._watch is not None:
            rows = self._watch.enter(linear, rows)
        y = linear.run(rows, self._seed)
        if self._watch is not None:
            self._watch.leave(linear, rows, y)
        return y.double()[None]


class _Fused:
    """One call for all shards of a fused linear, which ask for their columns one after another."""

    def __init__(self, model: Llama, linear: Linear, columns: Sequence[int]) -> None:
        self.model, self.linear, self.columns = model, linear, columns
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        if x is not self._x:
            self._x, self._parts = x, self.model.call(self.linear, x).split(list(self.columns), -1)
        found = self._parts[index]
        if index == len(self.columns) - 1:
            self._x, self._parts = None, ()
        return found


class _Shard(nn.Module):
    """What transformers calls in place of one ``nn.Linear``."""

    def __init__(self, fused: _Fused, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(self.index, x)
