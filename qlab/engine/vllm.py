"""vLLM's own engine behind qlab's interface: the real ``LLM``, its scheduler, its attention, its kernels on this machine's GPU.

vLLM chooses kernels per process from environment variables, and the batching of a request is set when its engine is made. So an
engine is one path with one batching, usually in a process of its own (:func:`remote`). Read from vLLM 0.20.2.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from pathlib import Path as File
from typing import Any

import torch

from qlab import checkpoint, hardware
from qlab.backends import dispatch
from qlab.backends.registry import Problem, kernels
from qlab.checkpoint.files import read_json
from qlab.checkpoint.llama import fused_name, fused_weight
from qlab.engine import vllm_answers, vllm_plugin
from qlab.engine.path import Path
from qlab.engine.request import check
from qlab.engine.run import ALONE, Advance, Call, Request, Row, Run
from qlab.engine.schedule import Batching, Span, Steps
from qlab.engine.vllm_recorder import Record
from qlab.engine.worker import Remote
from qlab.errors import CheckpointError, QlabError, UnsupportedError
from qlab.lab.outputs import NATIVE, recipe_of
from qlab.recipe import Recipe

LONGEST = 4096
"""Positions that an engine is made for, where the model has more."""
BLOCK = 16
"""Tokens of a block of vLLM's KV cache."""


def environment(path: Path) -> dict[str, str | None]:
    """Variables that vLLM must see before it starts, so that it runs ``path`` and nothing else decides."""
    return {
        "VLLM_DISABLED_KERNELS": "MacheteLinearKernel" if path.dispatch == "pinned" else "",
        vllm_plugin.SWITCH: "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_BATCH_INVARIANT": "0",
        "VLLM_USE_TRITON_AWQ": "0",
        "VLLM_MARLIN_USE_ATOMIC_ADD": "0",
        "VLLM_MARLIN_INPUT_DTYPE": None,
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_DEEP_GEMM_WARMUP": "skip",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "HF_HUB_OFFLINE": "1",
    }


def remote(
    directory: File, path: Path, batching: Batching = ALONE, *, log: File | None = None, seconds: float = 600.0, **options: Any
) -> Remote:
    """A :class:`VllmEngine` in a process of its own, which starts at once; ``options`` are its. Close it.

    Raises UnsupportedError where vLLM is not installed; what else is wrong shows at the first use.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed here; pip install 'qlab[vllm]'")
    given = environment(path)
    return Remote(VllmEngine, directory, path, batching, environment=given, log=log, seconds=seconds, **options)


class VllmEngine:
    """The checkpoint in ``directory`` on ``path``, in this process, for requests of one batching.

    Args:
        memory: share of the GPU's memory that must be free at the start; weights and cache take what they need.
        tensor_parallel: GPUs that share the model, each linear cut between them.
        attention_backend: vLLM's name of one (``TRITON_ATTN``); empty for its own choice.
        max_len: positions of the longest sequence; 0 for the model's own, up to :data:`LONGEST`.

    Raises UnsupportedError where the path's GPU is not this machine's or the path is no label of vLLM's, CheckpointError for a
    checkpoint that the label does not run, QlabError where this process started another vLLM before.
    """

    name = "vllm"
    native = True

    def __init__(
        self,
        directory: File,
        path: Path,
        batching: Batching = ALONE,
        *,
        dtype: torch.dtype = torch.float16,
        memory: float = 0.1,
        tensor_parallel: int = 1,
        attention_backend: str = "",
        max_len: int = 0,
    ) -> None:
        self.directory, self.path, self.batching, self.dtype = File(directory), path, batching, dtype
        self.tensor_parallel = tensor_parallel
        if batching.together < 1 or batching.budget < batching.together:
            raise QlabError(f"a budget of {batching.budget} tokens per step cannot serve {batching.together} sequences at once")
        if path.method not in dispatch.LABELS:
            raise UnsupportedError(f"{path}: vLLM serves its labels {', '.join(dispatch.LABELS)}, not single kernels")
        if path.method in ("awq", "gptq") and dtype != torch.float16:
            raise UnsupportedError(f"{path}: vLLM's {path.method} takes float16 only")
        _check_gpu(path)
        self._files = checkpoint.read(self.directory, dtype=dtype)
        if self._files.method != path.source:
            raise CheckpointError(
                f"{directory}: a checkpoint of {self._files.method}, which vLLM does not run as {path.method}"
            )
        config = read_json(self.directory, "config.json")
        self.vocabulary = int(config["vocab_size"])
        self.longest = max_len or min(int(config["max_position_embeddings"]), LONGEST)
        self.linears = tuple(dict.fromkeys(fused_name(n) for n in self._files.names()))
        self._problems: dict[str, Problem] = {}
        self._recipes: dict[tuple[str, Problem], str] = {}
        wanted = environment(path)
        for variable, value in wanted.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        from vllm import LLM, envs

        if " ".join(envs.VLLM_DISABLED_KERNELS) != wanted["VLLM_DISABLED_KERNELS"]:
            raise QlabError("this process started vLLM before with other kernels disabled; use qlab.engine.vllm.remote")
        vllm_plugin.install()
        backend = {"attention_backend": attention_backend} if attention_backend else {}
        self._llm = LLM(
            model=str(self.directory.resolve()),
            quantization=path.method,
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            generation_config="vllm",
            seed=0,
            enforce_eager=True,
            max_model_len=self.longest,
            max_num_batched_tokens=batching.budget,
            max_num_seqs=batching.together,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
            gpu_memory_utilization=memory,
            kv_cache_memory_bytes=_cache_bytes(config, self.longest, batching.together),
            tensor_parallel_size=tensor_parallel,
            disable_custom_all_reduce=True,
            logits_processors=["qlab.engine.vllm_forced:Forced"],
            worker_extension_cls="qlab.engine.vllm_plugin.Recording",
            **backend,
        )

    def run(self, request: Request, advance: Advance = lambda tokens: None) -> Run:
        """Raises QlabError for another batching than the engine's, and UnsupportedError for rows of a linear that is cut."""
        check(request, self.vocabulary, self.longest, self.linears)
        if request.batching != self.batching:
            raise UnsupportedError(
                f"this vLLM engine was made for {self.batching}, not {request.batching}; make another for it"
            )
        if self.tensor_parallel > 1 and (request.taps or request.digests):
            raise UnsupportedError(f"rows are not kept where linears are cut between {self.tensor_parallel} GPUs")
        longest = max(map(len, request.prompts)) + request.new_tokens
        if longest > self.longest:
            raise QlabError(
                f"a prompt with its new tokens has {longest}, and this vLLM engine takes {self.longest}; set max_len"
            )
        self._llm.collective_rpc("qlab_begin", args=([tuple(t) for t in sorted(request.taps)], request.digests))
        try:
            outputs = self._generate(request)
        finally:
            record = self._llm.collective_rpc("qlab_end")[0]
        sequences = [
            vllm_answers.scored(request, i, o.prompt_logprobs, o.outputs[0].logprobs, o.outputs[0].token_ids, self.vocabulary)
            for i, o in enumerate(outputs)
        ]
        advance(sum(len(s.tokens) - 1 for s in sequences))
        names = tuple(record.linears)
        if request.digests:
            sequences = [dataclasses.replace(s, digests=d) for s, d in zip(sequences, _digests(record, sequences), strict=True)]
        rows = [Row(tap, row, m, kernel, x, y) for tap, row, m, kernel, x, y in record.rows]
        order = {name: i for i, name in enumerate(names)}
        return Run(
            tuple(sequences),
            _steps(record),
            self._calls(record),
            tuple(sorted(rows, key=lambda r: (r.tap.sequence, r.tap.position, order[r.tap.linear]))),
            names,
            self._notes(),
        )

    def close(self) -> None:
        """Let go of the GPU."""
        engine = self.__dict__.pop("_llm", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()

    def _generate(self, request: Request) -> list[Any]:
        """vLLM's outputs, in the order of the prompts."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        count = vllm_answers.how_many(request, self.vocabulary)
        parameters = []
        for i in range(len(request.prompts)):
            drawn = request.sampling.temperature if request.forced is None else 0.0
            extra: dict[str, Any] = {vllm_plugin.SEQUENCE: i}
            if request.forced is not None:
                extra[vllm_plugin.FORCED] = list(request.forced[i])
            parameters.append(
                SamplingParams(
                    temperature=drawn,
                    seed=request.sampling.seed + request.first + i if drawn else None,
                    max_tokens=request.new_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=count,
                    prompt_logprobs=count,
                    flat_logprobs=True,
                    extra_args=extra,
                )
            )
        prompts = [TokensPrompt(prompt_token_ids=list(p)) for p in request.prompts]
        return list(self._llm.generate(prompts, parameters, use_tqdm=False))

    def _calls(self, record: Record) -> tuple[Call, ...]:
        order = {name: i for i, name in enumerate(record.linears)}
        listed = sorted(record.calls, key=lambda c: (order[c[0]], c[1]))
        return tuple(Call(name, m, kernel, NATIVE, self._recipe(name, m, kernel), n) for name, m, kernel, n in listed)

    def _recipe(self, linear: str, m: int, kernel: str) -> str:
        """Hash of the kernel's recipe; empty where it has none or holds a part of the linear alone."""
        named = next((k for k in kernels() if k.name == kernel), None)
        if named is None or self.tensor_parallel > 1 or linear not in self.linears:
            return ""
        key = (kernel, dataclasses.replace(self._problem(linear), M=m))
        if key not in self._recipes:
            made = recipe_of(named, key[1], hardware.gpu(self.path.gpu))
            self._recipes[key] = made.hash if isinstance(made, Recipe) else ""
        return self._recipes[key]

    def _problem(self, linear: str) -> Problem:
        """Read from the first layer that has such a linear: unpacking every layer of a large model would take minutes."""
        kind = ".".join(linear.split(".")[-2:])
        if kind not in self._problems:
            first = next(name for name in self.linears if name.endswith(f".{kind}"))
            self._problems[kind] = Problem.of(fused_weight(self._files, first), 0)
        return self._problems[kind]

    def _notes(self) -> dict[str, str]:
        return {
            "vllm": importlib.metadata.version("vllm"),
            "attention": ", ".join(self._llm.collective_rpc("qlab_attention")[0]),
            "disabled kernels": environment(self.path)["VLLM_DISABLED_KERNELS"] or "",
            "tensor parallel": str(self.tensor_parallel),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }


def _check_gpu(path: Path) -> None:
    here = hardware.detect()
    if here is None:
        raise UnsupportedError(
            f"{path}: vLLM needs a CUDA GPU, and torch finds none; qlab's own engine replays the path anywhere"
        )
    if here.key != path.gpu:
        raise UnsupportedError(
            f"{path}: vLLM runs on this machine's GPU, which is {here.key}; qlab's own engine replays others"
        )


def _cache_bytes(config: dict[str, Any], longest: int, together: int) -> int:
    """Bytes of KV cache for ``together`` sequences of ``longest`` tokens and some to spare.

    Given in bytes, because vLLM's own measurement of free memory fails while another process uses the GPU.
    """
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads) * int(config.get("num_key_value_heads") or heads)
    blocks = (together + 1) * (-(-longest // BLOCK) + 1) + 16
    return 2 * 2 * int(config["num_hidden_layers"]) * width * BLOCK * blocks


def _steps(record: Record) -> Steps:
    return tuple(tuple(Span(*span) for span in step) for step in record.steps)


def _digests(record: Record, sequences: list[Any]) -> list[torch.Tensor]:
    """int64 [linears, rows] per sequence."""
    order = {name: i for i, name in enumerate(record.linears)}
    made = [torch.zeros((len(order), len(s.tokens) - 1), dtype=torch.int64) for s in sequences]
    for linear, sequence, position, digest in record.digests:
        made[sequence][order[linear], position] = digest
    return made
