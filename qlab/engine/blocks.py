"""A model in pieces: decoder layers around quantised linears, each built when it is asked for, and what stands around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlab.checkpoint.llama import shard_names
from qlab.engine import attention
from qlab.engine.attention import Cache
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.errors import CheckpointError
from qlab.lab.activations import TAPS
from qlab.lab.model_files import ModelFiles
from qlab.lab.transformer import build, load, need, read_config, rotary, widen_norms
from qlab.weights import Int4Weight, round_once

WIDE = 1 << 26
"""Elements of the head in float64 at once (512 MiB); a smaller head stays widened."""
Call = Callable[[Linear, Tensor], Tensor]
"""What a decoder layer does where it meets a linear: y [1, T, N] for x [1, T, K], both float64."""


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer."""

    module: Any
    """transformers' layer in float64, its projections replaced."""
    linears: dict[str, Linear]
    """By tap, as in :data:`qlab.lab.activations.TAPS`."""


class Blocks:
    """A checkpoint's decoder, in pieces on ``device``. Only embedding, final norm and head stay in memory.

    Raises CheckpointError where directory and configuration do not make such a model.
    """

    def __init__(self, files: ModelFiles, device: torch.device) -> None:
        self.files, self.directory, self.device = files, files.directory, device
        self.config = read_config(self.directory)
        attention.register()
        self._body = build(self.directory, self.config, attention.NAME).model.eval()
        self.depth = len(self._body.layers)
        """Decoder layers."""
        self.norm: Any = self._body.norm
        load(self.norm, "model.norm.", files.dense, self.directory, device)
        widen_norms(self.norm)
        self.embedding = self._matrix("model.embed_tokens.weight")
        """[vocabulary, hidden], as stored."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        self.head = self.embedding if tied else self._matrix("lm_head.weight")
        """[vocabulary, hidden], float64 unless it is wide."""
        if self.head.numel() <= WIDE:
            self.head = self.head.double()
        self._rotary = rotary(self._body, self.config, 0)

    @property
    def vocabulary(self) -> int:
        """Token ids that the embedding has."""
        return len(self.embedding)

    @property
    def longest(self) -> int:
        """Tokens that the positions, and attention without a sliding window, are made for."""
        most = int(self.config.max_position_embeddings)
        window = getattr(self.config, "sliding_window", None)
        return most if window is None else min(most, int(window))

    @property
    def own_values(self) -> bool:
        """Whether every query head has a value head of its own, so that o's input is v's output, channel by channel."""
        return bool(self.config.num_attention_heads == self.config.num_key_value_heads)

    def block(self, index: int, path: Path, native: bool | None, call: Call, like: Block | None = None) -> Block:
        """Decoder layer ``index`` with its linears on ``path``, which run through ``call``.

        ``like`` is the same layer of the same checkpoint on another path: its weights are not read again.
        """
        module, linears = copy.deepcopy(self._body.layers[index]), {}
        for tap in TAPS:
            known = None if like is None else like.linears[tap].weight
            linears[tap] = self._linear(module, f"model.layers.{index}.{tap}", tap, path, native, call, known)
        load(module, f"model.layers.{index}.", self.files.dense, self.directory, self.device)
        widen_norms(module)
        return Block(module, linears)

    def cache(self, layers: int, tokens: int) -> Cache:
        """Room for a sequence."""
        width = int(self._body.layers[0].self_attn.head_dim)
        return Cache.empty(layers, int(self.config.num_key_value_heads), tokens, width, self.device)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """The residual stream before the first layer: float64 [1, T, hidden]."""
        return self.embedding[torch.tensor(tokens, device=self.device)].double()[None]

    def turn(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of at least ``tokens`` positions, float64 [1, positions, head_dim]."""
        if self._rotary[0].shape[1] < tokens:
            count = min(self.longest, max(256, 2 * tokens))
            cosine, sine = rotary(self._body, self.config, count)
            self._rotary = cosine.to(self.device), sine.to(self.device)
        return self._rotary

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [T, vocabulary], float64, for the residual stream [1, T, hidden] behind the last layer."""
        normed = self.norm(hidden)[0]
        return torch.cat([normed @ part.t() for part in self.heads()], -1).log_softmax(-1)

    def heads(self) -> Iterator[Tensor]:
        """The head's rows in turn, float64 [rows, hidden]."""
        if self.head.dtype == torch.float64:
            yield self.head
            return
        for part in self.head.split(max(1, WIDE // self.head.shape[1])):
            yield part.double()

    @contextmanager
    def threads(self) -> Iterator[None]:
        """On a CPU, PyTorch keeps to one thread around a small model.

        More save nothing there, cost tenfold where others use the cores, and could sum in another order. The replay's own
        threads stay.
        """
        before = torch.get_num_threads()
        if self.device.type == "cpu" and self.head.dtype == torch.float64:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _matrix(self, name: str) -> Tensor:
        found = need(self.files.dense(name), self.directory, name)
        want = [int(self.config.vocab_size), int(self.config.hidden_size)]
        if list(found.shape) != want:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is {list(found.shape)}, config.json asks for {want}; "
                "the two belong to different models"
            )
        return found.to(self.device)

    def _linear(
        self, layer: nn.Module, name: str, tap: str, path: Path, native: bool | None, call: Call, known: Int4Weight | None
    ) -> Linear:
        """Put the fused linear ``name`` in place of its modules in ``layer``."""
        weight = self.files.weight(name) if known is None else known
        modules = [cast(nn.Linear, layer.get_submodule(shard)) for shard in shard_names(tap)]
        columns = [m.out_features for m in modules]
        found, want = [weight.K, weight.N], [modules[0].in_features, sum(columns)]
        if found != want:
            raise CheckpointError(
                f"{self.directory}: linear {name!r} is {found}, config.json asks for {want}; the two belong to different models"
            )
        bias = None
        if modules[0].bias is not None:
            shards = [f"{shard}.bias" for shard in shard_names(name)]
            parts = [need(self.files.dense(shard), self.directory, shard) for shard in shards]
            bias = round_once(torch.cat(parts).double(), weight.dtype)
        linear = Linear(weight, path, self.device, native=native, bias=bias)
        fused = _Fused(call, linear, columns)
        for i, shard in enumerate(shard_names(tap)):
            parent, _, leaf = shard.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, _Shard(fused, i))
        return linear


class _Fused:
    """One call for all shards of a fused linear, which ask for their columns one after another."""

    def __init__(self, call: Call, linear: Linear, columns: Sequence[int]) -> None:
        self.call, self.linear, self.columns = call, linear, columns
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        if x is not self._x:
            self._x, self._parts = x, self.call(self.linear, x).split(list(self.columns), -1)
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
