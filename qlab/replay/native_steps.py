"""Which steps of a program a GPU's own instructions compute, and which of its regions one thread block computes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from qlab import hardware
from qlab.replay.program import TYPES, Int32, Kind, Op, Program

Instruction = Literal["k16", "k8", "fma", "dot", "plain"]
"""``k16`` and ``k8``: mma.sync m16n8k16, or two m16n8k8 in turn; ``fma`` and ``dot``: CUDA cores; ``plain``: the emulation's
kernel for rare steps without a tensor core, one output per thread."""
DOT_TERMS = (2, 4, 8, 16)
"""Terms of an fp16 dot that the fast kernel takes."""
FP32 = TYPES["fp32"]


def instruction(row: Sequence[int] | Int32, is_bf16: bool, gpu: hardware.Gpu) -> tuple[Instruction | None, str]:
    """What computes a step (a row of ``Program.steps``) on ``gpu``; None and the reason where nothing does."""
    kind, fraction_bits, terms, zero_exponent, accumulator = (int(v) for v in row[:5])
    if kind == Kind.FMA:
        return ("fma" if accumulator == FP32 else "plain"), ""
    if kind == Kind.HALF_DOT:
        return ("dot" if terms in DOT_TERMS and not is_bf16 else "plain"), ""
    step, half = gpu.step, accumulator != FP32
    if half and is_bf16:
        return None, "no tensor core has bf16 operands and fp16 accumulators"
    if gpu.capability < (8, 0):
        return None, f"the instructions need compute capability 8.0 and {gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}"
    if fraction_bits != step.fraction_bits:
        return None, f"{gpu.name}'s tensor cores keep F = {step.fraction_bits} bits, and the step keeps {fraction_bits}"
    own_zero = step.zero_exponent_fp16 if half else step.zero_exponent
    if zero_exponent != own_zero:
        return None, f"a zero term has the exponent {own_zero} on {gpu.name}, and {zero_exponent} in the step"
    if terms == step.terms:  # one instruction is one fused sum of 16, or two of 8 in turn
        return "k16", ""
    if (terms, step.terms) == (8, 16):
        return "k8", ""
    return None, f"{gpu.name}'s tensor cores add {step.terms} products at once (8 with m16n8k8), and the step adds {terms}"


def refusal(program: Program, is_bf16: bool, gpu: hardware.Gpu) -> str:
    """Why ``gpu``'s own instructions do not compute a program; empty where they do."""
    used = {int(step) for _, step, *_ in program.ops[program.ops[:, 0] == Op.CHAIN]}
    reasons = (instruction(program.steps[i], is_bf16, gpu)[1] for i in sorted(used))
    return "; ".join(dict.fromkeys(r for r in reasons if r))


def whole(program: Program, first: int, last: int, is_bf16: bool) -> tuple[int, int] | None:
    """The step of a region's program ``ops[first:last]`` and the values on its stack, where one block may compute it alone.

    That takes one step of a tensor core for all chains, sums of fp16 or bf16 only of values that the type holds (two roundings
    of such a sum are one), and a last value of the output's own type. None for other programs.
    """
    own, steps, stack, depth = TYPES["bf16" if is_bf16 else "fp16"], set[int](), list[int](), 0
    for code, argument, *_ in program.ops[first:last].tolist():
        if code == Op.CHAIN:
            steps.add(argument)
            stack.append(int(program.steps[argument, 4]))
        elif code == Op.ROUND:
            stack[-1] = argument if argument != FP32 else stack[-1]
        elif code == Op.ADD:
            b, a = stack.pop(), stack.pop()
            if argument != FP32 and not a == b == argument:
                return None
            stack.append(argument)
        elif code in (Op.SCALE, Op.BIAS):
            if not stack[-1] == argument == own:
                return None
        else:
            return None
        depth = max(depth, len(stack))
    if len(steps) != 1 or stack != [own]:
        return None
    (step,) = steps
    return (step, depth) if program.steps[step, 0] == Kind.TENSOR_CORE else None


def aligned(order: Int32, program: Program, k: int) -> bool:
    """Whether all chains walk over ``order`` in runs of 8 from multiples of 8: whole 16 bytes in rows of ``k`` values."""
    chains = {(int(a), int(b)) for code, _, a, b in program.ops if code == Op.CHAIN}
    if k % 8 or any((b - a) % 8 for a, b in chains):
        return False
    runs = np.arange(8, dtype=np.int32)
    for a, b in chains:
        eighths = order[a:b].reshape(-1, 8)
        if bool((eighths[:, :1] % 8).any()) or bool((eighths != eighths[:, :1] + runs).any()):
            return False
    return True
