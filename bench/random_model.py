"""A Llama of any size with random weights, written as AWQ and as GPTQ checkpoints in seconds, for timing and divergence.

    python -m bench.random_model --out random --layers 32      # the shape of Llama-3-8B but for the vocabulary

Both checkpoints share codes and scales. Codes are uniform over 1 to 15, so that weights have mean 0 about zero point 8; scales
differ per group and column by up to a quarter. GPTQ is symmetric. AWQ has the zero points 7 and 9 in a sixteenth of its groups
each, which moves its weights by 8% in norm: two quantisations of one weight differ by about as much (11% on the shipped model).
Norms are 1 and scales are chosen so that each linear keeps the size of its input; there is no tokenizer. ``prompts.json`` holds
random prompts. The same seed gives the same files on the same kind of device.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlab.checkpoint.declare import Facts, declare
from qlab.checkpoint.files import INDEX
from qlab.checkpoint.layouts import pack
from qlab.weights import Int4Weight, sequential_groups

GROUP = 128
SPREAD = (15**2 - 1) / 12
"""Variance of a code less its zero point."""
LOGITS = 2.5
"""Standard deviation of the logits."""
METHODS = ("awq", "gptq")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    layers: int = 32
    positions: int = 2048

    def linears(self) -> dict[str, tuple[int, int]]:
        """K and N of a layer's modules, by name."""
        width = self.hidden // self.heads
        kv = self.kv_heads * width
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    def config(self, method: str) -> dict[str, object]:
        """``config.json``."""
        facts = Facts(method, 1, GROUP, method == "gptq", False, torch.float16, ("model.embed_tokens", "lm_head"), False)
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "float16",
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
            "quantization_config": declare(facts),
        }


def weights(k: int, n: int, g: torch.Generator, name: str) -> dict[str, Int4Weight]:
    """The weight by method, on the generator's device."""
    device = g.device
    codes = torch.randint(1, 16, (k, n), generator=g, device=device, dtype=torch.uint8)
    groups = k // GROUP
    factor = 0.75 + 0.5 * torch.rand((groups, n), generator=g, device=device)
    scales = (factor / math.sqrt(SPREAD * k)).half()
    drawn = torch.randint(0, 16, (groups, n), generator=g, device=device, dtype=torch.uint8)
    moved = torch.where(drawn == 0, 7, torch.where(drawn == 1, 9, 8)).to(torch.uint8)
    zeros = {"awq": moved, "gptq": torch.full_like(moved, 8)}
    index = sequential_groups(k, GROUP).to(device)
    return {method: Int4Weight(codes, zeros[method], scales, index, name=name) for method in METHODS}


def write(out: Path, shape: Shape, device: torch.device, seed: int = 0) -> None:
    """Both checkpoints under ``out``, one file a layer; weights are made on ``device``."""
    g = torch.Generator(device).manual_seed(seed)
    places: dict[str, dict[str, str]] = {method: {} for method in METHODS}
    for method in METHODS:
        (out / method).mkdir(parents=True, exist_ok=True)

    def save(method: str, file: str, tensors: dict[str, Tensor]) -> None:
        kept = {name: t.cpu().contiguous() for name, t in tensors.items()}
        save_file(kept, out / method / file, metadata={"format": "pt"})
        places[method] |= dict.fromkeys(kept, file)

    for i in range(shape.layers):
        parts: dict[str, dict[str, Tensor]] = {method: {} for method in METHODS}
        for name, (k, n) in shape.linears().items():
            module = f"model.layers.{i}.{name}"
            for method, weight in weights(k, n, g, module).items():
                packed = pack(weight, method, version=1, symmetric=method == "gptq", act_order=False)
                parts[method] |= {f"{module}.{part}": t for part, t in packed.items()}
        ones = torch.ones(shape.hidden, dtype=torch.float16)
        norms = {f"model.layers.{i}.{n}.weight": ones.clone() for n in ("input_layernorm", "post_attention_layernorm")}
        for method in METHODS:
            save(method, f"layer-{i:03}.safetensors", {**parts[method], **norms})
    normal = torch.empty((2, shape.vocabulary, shape.hidden), device=device).normal_(generator=g)
    rest = {
        "model.embed_tokens.weight": normal[0].half(),
        "lm_head.weight": (normal[1] * (LOGITS / math.sqrt(shape.hidden))).half(),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.float16),
    }
    for method in METHODS:
        save(method, "rest.safetensors", rest)
        (out / method / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places[method]}))
        (out / method / "config.json").write_text(json.dumps(shape.config(method), indent=2) + "\n")


def write_prompts(file: Path, vocabulary: int, count: int, length: int, seed: int = 0) -> None:
    """Random token ids as ``--prompts`` takes them."""
    g = torch.Generator().manual_seed(seed)
    file.write_text(json.dumps(torch.randint(0, vocabulary, (count, length), generator=g).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for awq, gptq and prompts.json")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="of each prompt")
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in vars(Shape())})
    started = time.perf_counter()
    write(args.out, shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.seed)
    write_prompts(args.out / "prompts.json", shape.vocabulary, args.prompts, args.tokens, args.seed)
    print(f"{args.out}: awq and gptq, {shape.layers} layers, in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
