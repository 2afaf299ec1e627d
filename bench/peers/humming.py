"""humming, which compiles a kernel for every layer by NVRTC and chooses its tiles by rules of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peers.peer import Peer
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_kernel import first, needs
from qlab.packing import awq, gptq
from qlab.weights import ACTIVATION_DTYPES, Int4Weight


class Humming(Peer):
    name = "humming"
    package = "humming-kernels"
    module = "humming.layer"
    slow_start = True
    note = "mma.sync for few rows, wgmma with TMA above; its own heuristics, fp32 sums, stream-K"

    def __init__(self) -> None:
        super().__init__()
        self.configs: dict[Problem, Any] = {}

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "humming takes fp16 and bf16"),
            needs(capability >= (7, 5), "humming needs compute capability 7.5"),
            needs(not problem.act_order, "humming has no act-order"),
            needs(problem.zero_max <= 15, "humming's AWQ type holds zero points 0 to 15"),
        )

    def pack(self, weight: Int4Weight) -> Packed:
        from humming.layer import HummingLayer

        problem, group = Problem.of(weight, 0), weight.group_size
        if weight.symmetric:
            kind = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
            t = gptq.pack(weight)
            tensors = {"qweight": t.qweight, "qzeros": t.qzeros, "scales": t.scales}
        else:
            kind = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
            a = awq.pack(weight)
            tensors = {"qweight": a.qweight, "qzeros": a.qzeros, "scales": a.scales}
        with torch.device(weight.device):  # else its parameters are made on the CPU first
            layer = HummingLayer(weight.N, weight.K, weight_config=kind, torch_dtype=weight.dtype).to(weight.device)
        layer.load_from_tensors(tensors)
        layer.transform()
        self.configs[problem] = layer.humming_config
        names = ("weight", "weight_scale", "zero_point", "weight_scale_2", "locks")
        held = {name: getattr(layer, name, None) for name in names}
        return Packed({name: t.detach() for name, t in held.items() if t is not None}, problem)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        from humming.forward import humming_forward

        y: Tensor = humming_forward(self.configs[packed.problem], inputs=x, **packed.tensors)
        return y


PEERS = (Humming(),)
