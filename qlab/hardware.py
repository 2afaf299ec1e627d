"""What qlab knows of each GPU, as one table: SM count, tensor-core step, memory bandwidth.

The step of a tensor core with fp16 or bf16 inputs adds ``terms`` exact products and the accumulator in one fused sum: every
term is aligned to the largest exponent, truncated toward zero to ``fraction_bits`` bits below it, added exactly, and the sum
is rounded toward zero to fp32 (to nearest for an fp16 accumulator). A zero term takes the exponent ``zero_exponent``.

Sources: Khattak and Mikaitis, arXiv 2512.07004; MMA-Sim, arXiv 2511.10909. SM counts and bandwidths: vendor data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlab.errors import QlabError


@dataclass(frozen=True)
class Step:
    """One fused dot-add of a tensor core (fp16 or bf16 inputs)."""

    fraction_bits: int
    """F: bits kept below the largest exponent."""
    terms: int
    """L: products per fused sum; the accumulator is one more term."""
    zero_exponent: int
    """Exponent that a zero term takes when the accumulator is fp32."""
    zero_exponent_fp16: int
    """The same for an fp16 accumulator."""


VOLTA = Step(23, 4, -131, -19)
AMPERE = Step(24, 8, -132, -20)
HOPPER = Step(25, 16, -133, -21)


@dataclass(frozen=True)
class Gpu:
    """One GPU model. ``bandwidth`` is the data sheet's memory bandwidth in bytes per second."""

    key: str
    name: str
    sms: int
    capability: tuple[int, int]
    step: Step
    bandwidth: float
    proved: bool = False
    """Whether whole kernels were compared with their replays on this model. Elsewhere a replay is a prediction, which rests on
    the step, as MMA-Sim has it (recorded single instructions agree for A100 and H100), and on the kernels' source."""

    def same_arithmetic(self, other: Gpu) -> bool:
        """True when a kernel's bits cannot tell the two apart, cuBLAS's aside: same step, SM count and instruction set."""
        return (self.sms, self.step, self.capability) == (other.sms, other.step, other.capability)


GPUS: tuple[Gpu, ...] = (
    Gpu("v100", "Tesla V100-SXM2", 80, (7, 0), VOLTA, 0.900e12),
    Gpu("t4", "Tesla T4", 40, (7, 5), AMPERE, 0.320e12),
    Gpu("a100", "NVIDIA A100-SXM4-80GB", 108, (8, 0), AMPERE, 2.039e12),
    Gpu("a10", "NVIDIA A10", 72, (8, 6), AMPERE, 0.600e12),
    Gpu("l40s", "NVIDIA L40S", 142, (8, 9), AMPERE, 0.864e12),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 128, (8, 9), AMPERE, 1.008e12),
    Gpu("h100", "NVIDIA H100 80GB HBM3", 132, (9, 0), HOPPER, 3.352e12, proved=True),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", 114, (9, 0), HOPPER, 2.039e12),
    Gpu("h200", "NVIDIA H200", 132, (9, 0), HOPPER, 4.800e12, proved=True),
    Gpu("b200", "NVIDIA B200", 148, (10, 0), HOPPER, 8.000e12),
)
_BY_KEY = {g.key: g for g in GPUS}


def gpu(key: str) -> Gpu:
    """The table's row for ``key`` (any case), e.g. ``gpu("h100")``. Raises QlabError naming the known keys."""
    try:
        return _BY_KEY[key.lower()]
    except KeyError:
        raise QlabError(f"unknown GPU {key!r}; known: {', '.join(_BY_KEY)}") from None


def detect() -> Gpu | None:
    """The GPU of this machine, or None without one that has tensor cores.

    A variant under another name (NVL, 40 GB, GH200) with a listed model's capability and SM count takes that model's key,
    since it computes the same bits, and an unknown bandwidth. Any other model takes its SM count from the driver.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (p.major, p.minor)
    if capability < (7, 0):
        return None
    for g in GPUS:
        if g.name == p.name and g.sms == p.multi_processor_count:
            return g
    for g in GPUS:
        if g.capability == capability and g.sms == p.multi_processor_count:
            return replace(g, name=p.name, bandwidth=float("nan"))
    step = VOLTA if capability < (7, 5) else AMPERE if p.major < 9 else HOPPER
    return Gpu(p.name.lower().replace(" ", "-"), p.name, p.multi_processor_count, capability, step, float("nan"))
