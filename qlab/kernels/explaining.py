"""``python -m qlab.kernels --explain A B``: why two paths differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab.command import FIGURES, answer, check_output, parse_shape, recorded, refuse, torch_device, torch_dtype
from qlab.errors import QlabError

if TYPE_CHECKING:
    import torch

    from qlab.attribution.result import Explained
    from qlab.engine.path import Path as EnginePath

TOKENS, PROMPTS, GROUP = 48, 12, 128
"""Of a prompt, of prompts, and rows of a group, unless they are named. 48 tokens keep every label off cuBLAS."""
ROWS = 64
"""Rows that ``--shape`` multiplies, in calls of M each: a single row's few differing outputs would say little."""
OTHERS = ("against", "weights", "awq", "gptq", "layers", "kernels", "runs", "probe", "trusted", "pin_marlin", "map", "values")
"""Options of the other modes."""
OF_A_MODEL = ("model", "model_b", "original", "text", "prompts", "decode", "top_k", "requantize")


def run(typed: Mapping[str, Any], given: Collection[str]) -> None:
    """Check every option, explain, print. Raises QlabError naming the option and the mend."""
    from rich.console import Console

    from qlab.report import explain as report

    refuse(given, OTHERS, "does not go with --explain A B; leave it out")
    check_output("--json", typed["json"])
    check_output("--plot", typed["plot"], FIGURES)
    result = _explained(typed, given)
    answer(result, typed["json"], lambda: report.show(result, Console(), every_layer=typed["every_layer"]))
    if typed["plot"]:
        report.waterfall(result, typed["plot"])


def _explained(typed: Mapping[str, Any], given: Collection[str]) -> Explained:
    from qlab.engine.path import Path as EnginePath

    dtype = torch_dtype(typed["dtype"])
    if all("@" in text for text in typed["explain"]):
        refuse(given, ("hw",), "is the GPU of a path that names none; both paths name theirs")
    a, b = (EnginePath.parse(text if "@" in text else f"{text}@{typed['hw']}") for text in typed["explain"])
    asked = _Asked(typed, given, a, b, dtype, torch_device(typed["device"]))
    return asked.on_layer() if typed["shape"] else asked.on_model()


@dataclass(frozen=True)
class _Asked:
    """What was asked, its options checked as far as they go for any subject."""

    typed: Mapping[str, Any]
    given: Collection[str]
    a: EnginePath
    b: EnginePath
    dtype: torch.dtype
    device: torch.device

    def on_layer(self) -> Explained:
        """One random layer, the same weight and input for both paths."""
        from qlab.attribution.explain import OneWeight, explain
        from qlab.attribution.subject import Layer
        from qlab.inputs import random_activations, random_weight

        t = self.typed
        refuse(self.given, (*OF_A_MODEL, "tokens"), "belongs to a model; --shape is one random layer")
        group = GROUP if t["group"] is None else t["group"]
        if len(t["shape"]) > 1:
            raise QlabError("--explain takes one --shape; name each in a call of its own")
        m, k, n = parse_shape(t["shape"][0], group)
        symmetric = "gptq" in (self.a.source, self.b.source)
        weight = random_weight(k, n, group, dtype=self.dtype, symmetric=symmetric, seed=t["seed"], name=f"{m},{k},{n}")
        x = random_activations(max(m, ROWS // m * m), k, dtype=self.dtype, seed=t["seed"]).to(self.device)
        kind = "symmetric" if symmetric else "asymmetric"
        rows = f"{len(x)} rows in calls of {m}"
        where = f"random layer, M,K,N = {m},{k},{n}, {rows}, groups of {weight.group_size}, {kind}, seed {t['seed']}"
        with _bar() as advance:
            subject = Layer(weight.to(self.device), x, self.a, self.b, m=m)
            return explain(subject, self.a, self.b, OneWeight(), where=where, advance=advance, **self._common())

    def on_model(self) -> Explained:
        """A model on real text."""
        from qlab.attribution.explain import OneWeight, explain
        from qlab.attribution.subject import Model
        from qlab.attribution.weights import WeightFactors, weight_factors
        from qlab.logprobs.engines import default_directory
        from qlab.logprobs.model import identify

        t = self.typed
        refuse(self.given, ("group",), "belongs to --shape; a model's checkpoint has its own group size")
        one = t["model"] or default_directory(self.a)
        alike = self.a.source == self.b.source or "" in (self.a.source, self.b.source)
        other = t["model_b"] or (one if alike else default_directory(self.b))
        if t["model"] and not t["model_b"] and not alike:
            raise QlabError(f"--model is a checkpoint for {self.a}; name the one that {self.b} serves with --model-b")
        same = other.resolve() == one.resolve()
        if same:
            refuse(self.given, ("requantize", "original"), "tells two checkpoints apart; both paths serve the same one")
        elif not t["requantize"]:
            refuse(self.given, ("original",), "is what --requantize starts from; add that")
        elif t["original"] is not None and not t["original"].is_dir():
            raise QlabError(f"--original {t['original']} is not a directory; name the unquantised model's")
        models = [identify(d) for d in ((one,) if same else (one, other))]
        if len({m.vocabulary for m in models}) > 1:
            raise QlabError(f"--model {one.name} and --model-b {other.name} have different vocabularies: they are two models")
        if t["top_k"] > models[0].vocabulary:
            raise QlabError(f"--top-k {t['top_k']}: the model has {models[0].vocabulary} token ids; name so many or fewer")
        prompts = self._prompts(one)
        with _bar() as advance:
            weights: WeightFactors | OneWeight = OneWeight(one)
            if not same:
                again = {"original": t["original"], "requantize": t["requantize"]}
                weights = weight_factors(one, other, done=lambda unit: advance(0, 0, unit), **again)
            subject = Model(
                weights,
                self.a,
                self.b,
                prompts,
                forced=t["decode"] + 1,
                top_k=t["top_k"],
                device=self.device,
                dtype=self.dtype,
                seed=t["seed"],
            )
            where = " and ".join(f"{m.name} ({m.method}, {m.digest[:16]})" for m in models)
            return explain(subject, self.a, self.b, weights, where=where, advance=advance, **self._common())

    def _prompts(self, directory: Path) -> list[list[int]]:
        """``--tokens`` ids that are prefilled, ``--decode`` that are fed one by one, and one that is only predicted."""
        from qlab import data
        from qlab.lab.transformer import read_config
        from qlab.layers.run import check_tokens
        from qlab.quantize.llama import tokenizer
        from qlab.quantize.text import read_text, token_rows

        t = self.typed
        prefilled = TOKENS if t["tokens"] is None else t["tokens"]
        if prefilled < 1:
            raise QlabError(f"--tokens {prefilled} must be at least 1")
        check_tokens(prefilled, (self.a, self.b))
        longest = int(read_config(directory).max_position_embeddings)
        if prefilled + t["decode"] > longest:
            raise QlabError(f"--tokens {prefilled} and --decode {t['decode']}: the model takes {longest} tokens; name fewer")
        text = data.heldout_text() if t["text"] is None else read_text(t["text"])
        length = prefilled + t["decode"] + 1
        count = t["prompts"] or PROMPTS
        rows: list[list[int]] = token_rows(tokenizer(directory), text, length, count).tolist()
        if len(rows) < count:
            raise QlabError(
                f"the text has {len(rows)} prompts of {length} tokens, not {count}; ask for fewer --prompts or --tokens"
            )
        return rows

    def _common(self) -> dict[str, Any]:
        arguments = recorded({name: v for name, v in self.typed.items() if name in self.given})
        return {"samples": self.typed["samples"], "seed": self.typed["seed"], "arguments": arguments}


@contextmanager
def _bar() -> Iterator[Callable[..., None]]:
    """A progress bar over hybrids, on standard error; before they are counted it names what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def advance(done: int, of: int, what: str = "hybrids") -> None:
            progress.update(task, completed=done, total=of or None, description=what)

        yield advance
