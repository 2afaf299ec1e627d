"""One kernel's output on one layer: native where this GPU is the asked one, by replay elsewhere, both where both can run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlab import compare, hardware
from qlab.backends import failure
from qlab.backends.registry import Kernel, Problem
from qlab.backends.triton import TritonKernel
from qlab.backends.vllm_kernel import VllmKernel, too_large
from qlab.errors import UnsupportedError
from qlab.recipe import Recipe
from qlab.recipes import DEFAULT, builders, recipe
from qlab.replay import replay
from qlab.weights import Int4Weight

NATIVE, REPLAY, OPAQUE = "native", "replay", "opaque"


@dataclass(frozen=True, eq=False)
class Output:
    """What came of one kernel on one layer."""

    origin: str
    """``native``, ``replay``, ``opaque`` (its bits are cuBLAS's and it did not run), or empty where it cannot run at all."""
    reason: str = ""
    """Why there is no output; empty when there is one."""
    ys: tuple[Tensor, ...] = ()
    """One output per run."""
    fixed: bool = False
    """True where the recipe fixes every bit, so that one run of a replay stands for all."""
    recipe: str = ""
    """Hash of the kernel's recipe; empty where it has none."""
    replay_bits: int | None = None
    """Bits in which native and replay differ; None where they were not compared."""


class Replays:
    """Replays on one layer's weight and input; equal recipes are executed once."""

    def __init__(self, weight: Int4Weight, x: Tensor) -> None:
        self.weight, self.x = weight, x
        self._known: dict[tuple[str, int | None], Tensor] = {}

    def run(self, made: Recipe, seed: int | None = None) -> Tensor:
        """y [M, N]. Raises UnsupportedError as :func:`qlab.replay.replay`."""
        key = (made.hash, None if made.ordered else seed)
        if key not in self._known:
            self._known[key] = replay(made, self.x, self.weight, seed=key[1])
        return self._known[key]


def refusal(kernel: Kernel, problem: Problem, gpu: hardware.Gpu) -> str:
    """Why ``kernel`` does not run ``problem`` on ``gpu``, whatever this machine is; empty when it does."""
    large = too_large(problem) if isinstance(kernel, VllmKernel) else ""
    return kernel.refusal(problem, gpu.capability) or large


def recipe_of(kernel: Kernel, problem: Problem, gpu: hardware.Gpu) -> Recipe | str:
    """The kernel's recipe on ``gpu``, or why there is none."""
    if kernel.name not in builders():
        return f"{kernel.name} has no recipe, so it runs on its own GPU only"
    if why := refusal(kernel, problem, gpu):
        return why
    try:
        return recipe(kernel.name, problem, gpu, DEFAULT)
    except UnsupportedError as e:
        return str(e)


def opaque_reason(recipe: Recipe, gpu: hardware.Gpu) -> str:
    """Why an opaque recipe of ``gpu`` cannot be replayed."""
    return f"opaque: {recipe.opaque} is not modelled, so only {gpu.key} itself can run it"


def output(kernel: Kernel, replays: Replays, gpu: hardware.Gpu, *, native: bool, runs: int, seed: int) -> Output:
    """Run ``kernel`` on the layer: ``native`` says whether this machine is ``gpu``. References are native everywhere."""
    weight, x = replays.weight, replays.x
    problem, device = Problem.of(weight, x.shape[0]), x.device
    support = kernel.supports(problem, device) if native or kernel.portable else None
    made = "" if kernel.portable else recipe_of(kernel, problem, gpu)
    known = made.hash if isinstance(made, Recipe) else ""
    if support and support.ok:
        try:
            packed = kernel.pack(weight)
            ys = tuple(kernel.run(x, packed) for _ in range(runs))
            failure.wait(device)
        except Exception as e:  # one broken kernel costs its own cells, not the run
            return Output("", failure.reason(e, kernel.name, device), recipe=known)
        bits = None
        if isinstance(made, Recipe) and made.ordered and not made.opaque:
            bits = compare.differing_bits(ys[0], replays.run(made))
        return Output(NATIVE, "", ys, recipe=known, replay_bits=bits)
    if not isinstance(made, Recipe):
        return Output("", made or (support.reason if support else ""))
    if made.opaque:
        return Output(OPAQUE, opaque_reason(made, gpu), recipe=known)
    count = 1 if made.ordered else runs
    ys = tuple(replays.run(made, seed + i) for i in range(count))
    return Output(REPLAY, "", ys, fixed=made.ordered, recipe=known)


def version(kernel: Kernel, *, native: bool) -> str:
    """The build behind a column: what is installed here, or what the recipe describes."""
    if native or kernel.portable:
        return kernel.version()
    if kernel.name not in builders():
        return ""
    if isinstance(kernel, TritonKernel):
        return f"recipe of triton {DEFAULT.triton}"
    return f"recipe of vLLM {DEFAULT.vllm}" if isinstance(kernel, VllmKernel) else "recipe of qlab"
