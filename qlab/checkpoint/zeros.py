"""Which zero-point convention a checkpoint really follows, found from its tensors.

GPTQ v1 stores z - 1 and v2 stores z; files are mislabelled often enough that the label alone gives wrong weights. Two facts
speak: a symmetric checkpoint stores 7 (v1) or 8 (v2) everywhere, and a trained weight's values centre on zero, so that the
mean code of a group sits on the true zero point and not one beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlab.checkpoint.config import QuantConfig
from qlab.checkpoint.files import TensorFiles
from qlab.checkpoint.layouts import ZEROS, load
from qlab.packing.gptq import Version

MINUS_ONE = "stored minus one"
AS_IS = "stored as is"
IMPLIED = "implied 8"
_MODULES, _COLUMNS = 8, 256
_NEAR, _SURE, _LINKED = 0.25, 0.05, 0.3


@dataclass(frozen=True)
class ZeroPoints:
    """The report. ``used`` is what weights are read with: the detected convention, or the declared one where none was seen."""

    declared: str
    """``stored minus one``, ``stored as is`` or ``implied 8`` (no tensor, uint4b8)."""
    detected: str
    """The same, or empty when the tensors do not tell."""
    evidence: str
    """One or more clauses: what was seen."""
    warning: str = ""
    """Where kernels would not agree on what the file means."""

    @property
    def used(self) -> str:
        return self.detected or self.declared

    @property
    def contradiction(self) -> bool:
        return bool(self.detected) and self.detected != self.declared

    @property
    def version(self) -> Version:
        """GPTQ version to unpack with."""
        return 1 if self.used == MINUS_ONE else 2

    def __str__(self) -> str:
        how = (
            f"but declared {self.declared}"
            if self.contradiction
            else "as declared"
            if self.detected
            else "as declared, unconfirmed"
        )
        return f"zero points {self.used}, {how}: {self.evidence}" + (f"; warning: {self.warning}" if self.warning else "")


@dataclass(frozen=True)
class _Centre:
    """Mean of code minus stored zero point over sampled groups: 0 when zero points are stored as they are, 1 when minus one."""

    offset: float
    error: float
    linked: float
    """Correlation of a group's mean code with its stored zero point; near 0 says that these codes tell nothing."""
    layers: int

    @property
    def convention(self) -> str:
        if self.error > _SURE or self.linked < _LINKED:
            return ""
        return {0: AS_IS, 1: MINUS_ONE}.get(round(self.offset), "") if abs(self.offset - round(self.offset)) < _NEAR else ""

    def __str__(self) -> str:
        return (
            f"codes lie {self.offset:+.2f} ± {self.error:.2f} from the stored zero points on average over {self.layers} "
            "layers, where 0 means as is and +1 minus one"
        )


def detect(files: TensorFiles, modules: tuple[str, ...], config: QuantConfig) -> ZeroPoints:
    """Reads every stored zero point and a sample of the codes. Raises CheckpointError as reading the layers would."""
    stored = _histogram(files, modules, config.method)
    if not int(stored.sum()):
        return ZeroPoints(IMPLIED, IMPLIED, "no zero-point tensor")
    values = [v for v in range(16) if stored[v]]
    if config.method != "gptq":
        return _only_as_is(files, modules, config, values)
    declared = MINUS_ONE if config.version == 1 else AS_IS
    if values in ([7], [8]):
        detected = MINUS_ONE if values == [7] else AS_IS
        warning = "" if config.sym else "declared asymmetric, though every zero point is 8"
        return ZeroPoints(declared, detected, f"every stored value is {values[0]}, the symmetric one", warning)
    centre = _centre(files, modules, config)
    found = ZeroPoints(declared, centre.convention, f"stored values {values[0]} to {values[-1]}; {centre}")
    warnings = []
    if config.sym:
        warnings.append("declared symmetric, so Marlin and Machete ignore the stored values and take 8")
    if found.version == 1 and stored[15]:
        warnings.append(f"{int(stored[15])} values of 15 mean 16, unless the writer wrapped 0 - 1 and meant 0")
    return ZeroPoints(declared, found.detected, found.evidence, "; ".join(warnings))


def _only_as_is(files: TensorFiles, modules: tuple[str, ...], config: QuantConfig, values: list[int]) -> ZeroPoints:
    evidence = f"the layout has no other; stored values {values[0]} to {values[-1]}"
    warning = ""
    if values == [7]:
        warning = "every stored value is 7, which is GPTQ v1's way to store 8"
    elif len(values) > 1:
        centre = _centre(files, modules, config)
        evidence += f"; {centre}"
        if centre.convention == MINUS_ONE:
            warning = "the codes centre one above the stored values: the writer may have stored them minus one"
    if config.sym and values != [8]:
        warning = "declared symmetric, so kernels take 8 and ignore the stored values"
    return ZeroPoints(AS_IS, AS_IS, evidence, warning)


def _histogram(files: TensorFiles, modules: tuple[str, ...], method: str) -> torch.Tensor:
    """How often each of the 16 values is stored, over all modules: int64 [16]."""
    total = torch.zeros(16, dtype=torch.int64)
    for module in modules:
        name = f"{module}.{ZEROS[method]}"
        if name in files:
            packed = files.tensor(name).reshape(-1)
            for shift in range(0, 32, 4):
                total += torch.bincount((packed >> shift) & 15, minlength=16)
            if method == "compressed-tensors":  # its last int32 is filled up with zero nibbles
                n, groups = files.header(f"{module}.weight_scale").shape
                total[0] -= (-n % 8) * groups
    return total


def _centre(files: TensorFiles, modules: tuple[str, ...], config: QuantConfig) -> _Centre:
    step = max(1, len(modules) // _MODULES)
    sample = modules[::step][:_MODULES]
    means, zeros = [], []
    for module in sample:
        w = load(files, module, config, version=2, dtype=torch.bfloat16, columns=_COLUMNS)  # version 2: zeros as stored
        total = torch.zeros(w.groups, w.N).index_add_(0, w.group_index.long(), w.codes.float())
        means.append((total / w.group_size).reshape(-1))
        zeros.append(w.zeros.float().reshape(-1))
    mean, zero = torch.cat(means), torch.cat(zeros)
    difference = mean - zero
    spread = float(difference.std()) if len(difference) > 1 else float("inf")
    varies = bool(mean.std() > 0) and bool(zero.std() > 0)
    linked = float(torch.corrcoef(torch.stack([mean, zero]))[0, 1]) if varies else 0.0
    return _Centre(float(difference.mean()), spread / len(difference) ** 0.5, linked, len(sample))
