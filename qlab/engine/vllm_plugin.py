"""vLLM's plugin: its own linear layers tell a recorder what they computed.

An entry point of ``vllm.general_plugins`` names :func:`register`, so vLLM calls it in each of its processes. It does nothing
unless :data:`SWITCH` is 1 in the environment. Then it wraps the constructor of vLLM's linear layers, so that each quantised
layer reports its calls, and the step that lays out a batch's rows. A layer's Python runs on every call in eager mode alone:
compiled code and CUDA graphs would skip it, and pad M, so recording insists on ``enforce_eager``.

Read from vLLM 0.20.2: ``LinearBase`` (layers/linear.py) calls ``self.quant_method.apply(self, x, bias)`` on an object that each
layer owns; ``GPUModelRunner._prepare_inputs`` (v1/worker/gpu_model_runner.py) runs for real steps only, after the batch has its
final order.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlab.engine.vllm_recorder import Record, Recorder

SWITCH = "QLAB_VLLM_RECORD"
"""Environment variable that switches recording on."""
SEQUENCE = "qlab_sequence"
"""Key of a request's number in ``SamplingParams.extra_args``."""
FORCED = "qlab_forced"
"""Key of the token ids that a request must take, there too."""

_recorder: Recorder | None = None


def register() -> None:
    """Entry point: install the recorder where :data:`SWITCH` asks for it, once."""
    if os.environ.get(SWITCH) == "1":
        install()


def install() -> Recorder:
    """Wrap vLLM's layers in this process; models made from now on report to the recorder that is returned."""
    global _recorder
    if _recorder is None:
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        from qlab.engine.vllm_recorder import Recorder

        _recorder = Recorder()
        wrap_layers(LinearBase, _recorder)
        wrap_steps(GPUModelRunner, _recorder)
    return _recorder


def wrap_layers(base: Any, recorder: Recorder) -> None:
    """Let every quantised layer whose class descends from ``base`` tell ``recorder`` its calls."""
    made = base.__init__

    @functools.wraps(made)
    def constructor(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if getattr(self, "quant_config", None) is not None and not _plain(self.quant_method):
            _watch(self, recorder)

    base.__init__ = constructor


def wrap_steps(runner: Any, recorder: Recorder) -> None:
    """Let ``runner`` tell ``recorder`` which tokens are a step's rows."""
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def prepared(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        if recorder.active:
            recorder.step(layout(self, num_scheduled_tokens))
        return prepare(self, scheduler_output, num_scheduled_tokens)

    runner._prepare_inputs = prepared


def layout(runner: Any, counts: Any) -> list[tuple[int, int, int]]:
    """Sequence, start and stop of each request of the batch, in the order of its rows; -1 for a request that is not qlab's."""
    batch, spans = runner.input_batch, []
    for i, count in enumerate(counts):
        parameters = runner.requests[batch.req_ids[i]].sampling_params
        extra = getattr(parameters, "extra_args", None) or {}
        start = int(batch.num_computed_tokens_cpu[i])
        spans.append((int(extra.get(SEQUENCE, -1)), start, start + int(count)))
    return spans


def _plain(method: Any) -> bool:
    return method is None or type(method).__name__ == "UnquantizedLinearMethod"


def _watch(layer: Any, recorder: Recorder) -> None:
    from qlab.engine.vllm_names import kernel_name

    method = layer.quant_method
    apply = method.apply

    def watched(of: Any, x: Any, bias: Any = None) -> Any:
        y = apply(of, x, bias)
        if recorder.active:
            kernel = getattr(method, "kernel", None)
            tokens = x.numel() // x.shape[-1]
            name = kernel_name(type(method).__name__, "" if kernel is None else type(kernel).__name__, tokens)
            recorder.call(of.prefix, name, x, y)
        return y

    method.apply = watched


class Recording:
    """Methods that vLLM's worker gets (``worker_extension_cls``), to be called through ``LLM.collective_rpc``."""

    def qlab_begin(self, taps: list[tuple[str, int, int]], digests: bool) -> None:
        """Record from now on. Raises QlabError where the recorder is not installed or the engine is not eager."""
        from qlab.engine.run import Tap
        from qlab.errors import QlabError

        if _recorder is None:
            raise QlabError(f"qlab's vLLM plugin is not installed in this process; set {SWITCH}=1 before vLLM starts")
        if not self.vllm_config.model_config.enforce_eager:  # type: ignore[attr-defined]
            raise QlabError(
                "recording needs enforce_eager=True: compiled code and CUDA graphs skip the layers' Python and pad M"
            )
        _recorder.begin([Tap(*t) for t in taps], digests)

    def qlab_end(self) -> Record | None:
        """What this worker recorded."""
        return None if _recorder is None else _recorder.end()

    def qlab_attention(self) -> list[str]:
        """Names of the attention backends that the model runs."""
        groups = getattr(self.model_runner, "attn_groups", [])  # type: ignore[attr-defined]
        return sorted({group.backend.get_name() for layer in groups for group in layer})


register()  # a worker imports this for Recording; where qlab is not installed as a package, no entry point did it before
