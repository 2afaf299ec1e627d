"""Train the small Llama that travels with qlab, on one GPU (minutes) or on a CPU (a few steps, to try the script).

    python training/train.py --data DATA --out DIR --minutes 4

DATA comes from ``training/prepare.py``. DIR receives the weights of lowest validation loss as an fp16 LlamaForCausalLM with its
tokenizer, ``training.json`` (loss curve, held-out and unigram losses, arguments, machine) and ``curve.png`` where matplotlib
is installed. The best weights are written during training too, and SIGTERM or SIGINT ends training early but in order.

Four million tokens are few for eight million weights, so every epoch cuts the stream into windows at another offset, weights
decay, and dropout acts on the embedding, on the output of attention and MLP, and on attention's probabilities.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from curve import plot
from measure import END_OF_TEXT, stream_loss, summary, unigram_loss
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    args = arguments()
    started = time.monotonic()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = json.loads((args.data / "manifest.json").read_text())
    tokens = {s: np.load(args.data / f"{s}.npy") for s in ("train", "valid", "test")}
    streams = {s: torch.from_numpy(t.astype(np.int64)).to(device) for s, t in tokens.items()}
    for s in ("valid", "test"):
        streams[s] = streams[s][: args.evaluate_tokens or None]
    model = new_model(args).to(device)
    record = {
        "schema": 1,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("data", "out")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(device),
        "data": manifest,
        "curve": [],
    }
    train(model, streams, args, record, started)
    finish(args, tokens, streams, record, device)
    record["seconds"] = round(time.monotonic() - started, 1)
    write_record(args.out, record)
    plot(args.out)
    print(json.dumps({k: record[k] for k in ("best", "heldout", "unigram", "seconds")}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="wall clock for everything; the schedule shortens to fit")
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="end after this many steps, whatever --epochs says")
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--evaluate-tokens", type=int, default=0, help="only this much of valid and test; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    args = parser.parse_args()
    if not (args.data / "manifest.json").is_file():
        sys.exit(f"{args.data} holds no manifest.json; make it with training/prepare.py")
    return args


def new_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        attention_dropout=args.dropout,
    )
    model = LlamaForCausalLM(config)

    def drop(module: torch.nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, args.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model.float().train()


def train(model: LlamaForCausalLM, streams: dict[str, Tensor], args: argparse.Namespace, record: dict, started: float) -> None:
    """Train until epochs, steps, clock or a signal end it; ``args.out`` then holds the best weights."""
    stopped: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: stopped.append(number))
    device = streams["train"].device
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    total = args.steps or math.ceil(args.epochs * len(streams["train"]) / (args.batch * args.length))
    # Held-out measurement and saving come after training and have to fit as well.
    limit = max(args.minutes * 60 - 20, args.minutes * 30)
    best, last_write, running = math.inf, -math.inf, torch.zeros((), device=device)
    best_state, unwritten, since_evaluation = None, False, 0
    for step, window in zip(range(1, total + 1), batches(streams["train"], args), strict=False):
        elapsed = time.monotonic() - started
        progress = max(step / total, min(elapsed / limit, 1.0))
        rate = args.lr * min(step / args.warmup, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.detach()
        since_evaluation += 1
        over = elapsed > limit or bool(stopped) or step == total
        if step % args.evaluate_every and not over:
            continue
        valid = stream_loss(model, streams["valid"], args.length, autocast=True)
        mean = running.item() / since_evaluation
        running.zero_()
        since_evaluation = 0
        elapsed = time.monotonic() - started
        point = {"step": step, "tokens": step * args.batch * args.length, "seconds": round(elapsed, 1), "lr": rate}
        record["curve"].append(point | {"train_loss": mean, "valid_loss": valid})
        print(f"step {step}/{total}  train {mean:.4f}  valid {valid:.4f}  lr {rate:.2e}  {elapsed:.0f} s", flush=True)
        if not math.isfinite(mean):
            sys.exit(f"training loss is {mean} at step {step}; lower --lr")
        if valid < best:
            best, unwritten = valid, True
            best_state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            record["best"] = {"step": step, "valid_loss": valid}
        if unwritten and (over or elapsed - last_write > 30):
            save(model, best_state, args)
            write_record(args.out, record)
            last_write, unwritten = elapsed, False
        if over:
            break
    if best_state is None:
        sys.exit("training ended before the first evaluation; give it more --minutes")
    record["ended_by"] = "signal" if stopped else "steps" if step == total else "clock"


def batches(stream: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Endless int64 [batch, length + 1]: each epoch from another offset, its windows in another order."""
    width = args.length
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        offset = int(torch.randint(0, width, (1,), generator=generator))
        count = (len(stream) - offset - 1) // width
        order = torch.randperm(count, generator=generator)
        steps = torch.arange(width + 1)
        for i in range(0, count - args.batch + 1, args.batch):
            start = offset + order[i : i + args.batch, None] * width
            yield stream[(start + steps).to(stream.device, non_blocking=True)]


def save(model: LlamaForCausalLM, state: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Write the fp16 model and its tokenizer beside and rename file by file. Exits when a weight leaves fp16's range."""
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict({k: v.half() for k, v in state.items()})
    for name, p in half.named_parameters():
        if not bool(torch.isfinite(p).all()):
            sys.exit(f"{name} is not finite in fp16; train with more --weight-decay")
    half.config.attention_dropout = 0.0
    half.tie_weights()
    beside = args.out / ".partial"
    beside.mkdir(parents=True, exist_ok=True)
    half.save_pretrained(beside)
    model.config.attention_dropout = args.dropout
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.data / name, beside / name)
    for path in beside.iterdir():
        path.chmod(0o644)
        os.replace(path, args.out / path.name)
    beside.rmdir()


def finish(args: argparse.Namespace, tokens: dict, streams: dict[str, Tensor], record: dict, device: torch.device) -> None:
    """Measure the saved fp16 weights on the test split, in float32 arithmetic, and check fp16 arithmetic where it runs fast."""
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    torch.set_float32_matmul_precision("highest")
    test = tokens["test"][: len(streams["test"])]
    text_bytes = record["data"]["splits"]["test"]["bytes"] * len(test) / len(tokens["test"])
    record["heldout"] = summary(stream_loss(model, streams["test"], args.length), test, text_bytes)
    record["unigram"] = summary(unigram_loss(tokens["train"], test, model.config.vocab_size), test, text_bytes)
    if device.type == "cuda":
        # Loaded anew: half() would round the rotary frequencies, which stay in float32 when a model is loaded in fp16.
        model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float16).to(device)
        loss = stream_loss(model, streams["test"], args.length)
        record["heldout_fp16_arithmetic"] = summary(loss, test, text_bytes)


def machine(device: torch.device) -> dict[str, str | None]:
    """Names and versions that say where the record was made."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type != "cuda":
        return facts | {"device": "cpu", "driver": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return facts | {"device": torch.cuda.get_device_name(device), "driver": driver or None}


def write_record(folder: Path, record: dict) -> None:
    beside = folder / "training.json.partial"
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, folder / "training.json")


if __name__ == "__main__":
    main()
