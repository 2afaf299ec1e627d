"""How a checkpoint was quantised, and the settings that lie between two of them.

Two settings differ in factors: algorithm, zero points, group size, act-order, clipping. A coalition takes some of them from B;
it is admissible where a quantizer exists for the mixture: only GPTQ has act-order, only AWQ clips.
"""

from __future__ import annotations

import filecmp
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlab import checkpoint, data
from qlab.attribution.parts import Part
from qlab.errors import CheckpointError, QlabError
from qlab.quantize.model import Options
from qlab.weights import DTYPES

ALGORITHMS = {"awq": "AWQ", "gptq": "GPTQ", "rtn": "round to nearest"}
LAYOUTS = {"awq": "awq", "gptq": "gptq", "rtn": "gptq"}
"""Checkpoint layout that holds whatever an algorithm makes; AWQ's has no group index, GPTQ's has one."""
DAMPING = 0.01


@dataclass(frozen=True)
class Settings:
    """Of one quantised checkpoint. Raises QlabError for a mixture that no quantizer of qlab makes."""

    algorithm: str
    """``awq`` (input scales searched on activations), ``gptq`` or ``rtn``."""
    symmetric: bool
    """Every zero point 8; otherwise fitted to each group."""
    group_size: int = 128
    """Rows per scale; -1 for whole columns."""
    act_order: bool = False
    """GPTQ only."""
    static_groups: bool = False
    """GPTQ only."""
    damping: float = DAMPING
    """GPTQ only."""
    clip: bool = False
    """AWQ only: smaller ranges searched."""
    dtype: str = "float16"
    """Of scales and dense tensors."""

    def __post_init__(self) -> None:
        if reason := refusal(asdict(self)):
            raise QlabError(f"such settings do not exist: {reason}")

    def __str__(self) -> str:
        """``AWQ, asymmetric, groups of 128, clipped``."""
        group = "whole columns" if self.group_size == -1 else f"groups of {self.group_size}"
        parts = [ALGORITHMS[self.algorithm], "symmetric" if self.symmetric else "asymmetric", group]
        parts += [said for said, holds in (("act-order", self.act_order), ("clipped", self.clip)) if holds]
        return ", ".join(parts)

    def options(self) -> Options:
        """For :func:`qlab.quantize.model.quantize_model`."""
        return Options(
            method=self.algorithm,
            group_size=self.group_size,
            symmetric=self.symmetric,
            act_order=self.act_order,
            static_groups=self.static_groups,
            damping=self.damping,
            clip=self.clip,
            dtype=DTYPES[self.dtype],
        )


def refusal(fields: dict[str, Any]) -> str:
    """Why no quantizer makes settings of these fields; empty when one does."""
    algorithm = fields["algorithm"]
    if algorithm not in ALGORITHMS:
        return f"algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}"
    if fields["dtype"] not in DTYPES:
        return f"dtype {fields['dtype']!r} is none of {', '.join(DTYPES)}"
    if algorithm != "gptq" and (fields["act_order"] or fields["static_groups"] or fields["damping"] != DAMPING):
        return f"act-order, static groups and damping belong to gptq, not to {algorithm}"
    if algorithm != "awq" and fields["clip"]:
        return f"clipping belongs to awq, not to {algorithm}"
    return ""


def text(part: Part, settings: Settings) -> str:
    """What settings have of a part, in words."""
    if part.name == "algorithm":
        damped = f", damping {settings.damping:g}" if settings.damping != DAMPING else ""
        return ALGORITHMS[settings.algorithm] + damped
    if part.name == "zero points":
        return "8 everywhere" if settings.symmetric else "fitted to each group"
    if part.name == "group size":
        return "whole columns" if settings.group_size == -1 else f"{settings.group_size} rows"
    if part.name == "act-order":
        order = "by activation" if settings.act_order else "as they lie"
        return f"rows {order}" + (", static groups" if settings.static_groups else "")
    return "ranges searched" if settings.clip else "full ranges"


PARTS = (
    Part("algorithm", "weights", ("algorithm", "damping")),
    Part("zero points", "group layout", ("symmetric",)),
    Part("group size", "group layout", ("group_size",)),
    Part("act-order", "group layout", ("act_order", "static_groups")),
    Part("clipping", "weights", ("clip",)),
)


@dataclass(frozen=True)
class Between:
    """Two settings and the parts in which they differ; bit i of a mask takes ``parts[i]`` from ``b``."""

    a: Settings
    b: Settings

    def __post_init__(self) -> None:
        if self.a.dtype != self.b.dtype:
            raise QlabError(f"scales in {self.a.dtype} and in {self.b.dtype}; settings mix within one dtype only")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that differ, in the order of :data:`PARTS`."""
        return tuple(p for p in PARTS if any(getattr(self.a, f) != getattr(self.b, f) for f in p.attributes))

    def admissible(self, mask: int) -> bool:
        """Whether a quantizer exists for the mixture."""
        return not refusal(self._fields(mask))

    def settings(self, mask: int) -> Settings:
        """The mixture. Raises QlabError for an inadmissible one."""
        return Settings(**self._fields(mask))

    def _fields(self, mask: int) -> dict[str, Any]:
        fields, other = asdict(self.a), asdict(self.b)
        for i, part in enumerate(self.parts):
            if mask >> i & 1:
                fields |= {f: other[f] for f in part.attributes}
        return fields


SHIPPED = {"awq": Settings("awq", symmetric=False, clip=True), "gptq": Settings("gptq", symmetric=True)}
"""Of the checkpoints in the package, from the commands in ``qlab/data/README.md``."""


def known(directory: Path) -> Settings | None:
    """Settings of a shipped checkpoint or a copy of one, byte for byte; None for any other, whose files do not say them all."""
    names = ("config.json", "model.safetensors")
    for kind, settings in SHIPPED.items():
        try:
            home = data.model_directory(kind)  # type: ignore[arg-type]
        except CheckpointError:  # a copy of qlab without its data
            continue
        if all((directory / n).is_file() and filecmp.cmp(directory / n, home / n, shallow=False) for n in names):
            return settings
    return None


def declared(
    directory: Path,
    algorithm: str = "",
    *,
    clip: bool = False,
    static_groups: bool = False,
    damping: float = DAMPING,
) -> Settings:
    """Settings of a checkpoint from its files, and from the caller what no file says.

    ``algorithm`` defaults to the declared method. Group size and act-order are the declared ones, symmetry and dtype those of
    the weights. Raises CheckpointError for a directory that is no INT4 checkpoint, QlabError where the parts do not fit.
    """
    found = checkpoint.read(directory)
    if not algorithm and found.method not in ALGORITHMS:
        raise QlabError(f"{directory}: {found.method} does not say how codes were chosen; name the algorithm")
    symmetric, dtypes = True, set()
    for w in found.weights.values():
        symmetric &= w.symmetric
        dtypes.add(w.dtype)
    if len(dtypes) > 1:
        raise QlabError(f"{directory} has scales of both fp16 and bf16; settings have one dtype")
    return Settings(
        algorithm or found.method,
        symmetric,
        found.config.group_size,
        found.config.desc_act,
        static_groups,
        damping,
        clip,
        "float16" if dtypes == {torch.float16} else "bfloat16",
    )
