"""``quantization_config``, read and written, as the three methods spell it.

Key names follow vLLM's ``AWQConfig``, ``GPTQConfig`` and ``CompressedTensorsConfig``, older spellings included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlab.checkpoint.files import read_json
from qlab.errors import CheckpointError

METHODS = ("awq", "gptq", "compressed-tensors")
_ASIDE = ("quantize_config.json", "quant_config.json")
_WITH_INDEX, _WITHOUT_INDEX = ("group", "dynamic"), ("weight", "static")
"""compressed-tensors' names for act-order: groups follow the order of the rows, or their place in the matrix."""


@dataclass(frozen=True)
class QuantConfig:
    """What a checkpoint declares of its quantisation. Nothing here is trusted where the tensors can be asked."""

    method: str
    """``awq``, ``gptq`` or ``compressed-tensors``."""
    group_size: int
    """Rows per group; -1 for whole-column scales."""
    sym: bool
    """Declared symmetric: every zero point 8."""
    desc_act: bool = False
    """Declared act-order: rows carry a group index of their own."""
    checkpoint_format: str = ""
    """AWQ ``gemm``; GPTQ ``gptq`` (v1) or ``gptq_v2``; compressed-tensors ``pack-quantized``."""
    bits: int = 4
    source: Path = Path("config.json")
    """The file it was read from."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The whole declaration as it stands in the file."""

    def groups(self, k: int) -> int:
        """Groups of a layer with ``k`` rows; 0 when the group size does not divide them."""
        size = k if self.group_size == -1 else self.group_size
        return 0 if k % size else k // size

    @property
    def version(self) -> int:
        """GPTQ's declared version: 1 stores zero points minus one, 2 as they are."""
        return 2 if self.checkpoint_format == "gptq_v2" else 1


def quantised(directory: Path, hf_config: Mapping[str, Any]) -> bool:
    """Whether ``config.json``, or for older checkpoints a file beside it, declares a quantisation."""
    return _declared(hf_config) is not None or _aside(directory) is not None


def parse(directory: Path, hf_config: Mapping[str, Any]) -> QuantConfig:
    """The quantisation that ``config.json`` (or, for older checkpoints, a file beside it) declares.

    Raises CheckpointError for methods, bits and formats that are no 4-bit layout of qlab's.
    """
    source, raw = directory / "config.json", _declared(hf_config)
    if raw is None:
        name = _aside(directory)
        if name is None:
            raise CheckpointError(f"{source}: no quantization_config, so the model is not quantised; name an INT4 checkpoint")
        source, raw = directory / name, read_json(directory, name)
        raw.setdefault("quant_method", "gptq" if "desc_act" in raw else "awq")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source}: quantization_config must be an object, not {type(raw).__name__}; mend the file")
    keys = _Keys(source, raw)
    method = keys.text("quant_method").lower()
    if method not in METHODS:
        raise CheckpointError(f"{source}: quant_method {method!r} is not supported; supported: {', '.join(METHODS)}")
    return {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[method](keys)


def _declared(hf_config: Mapping[str, Any]) -> Any:
    return hf_config.get("quantization_config", hf_config.get("compression_config"))


def _aside(directory: Path) -> str | None:
    return next((name for name in _ASIDE if (directory / name).exists()), None)


def _awq(keys: _Keys) -> QuantConfig:
    keys.need_four_bits(keys.integer("bits", "w_bit"))
    size = keys.group_size("group_size", "q_group_size")
    form = keys.text("version", default="gemm").lower()
    if form != "gemm":
        raise keys.error("version", form, "only the gemm layout is read; convert the checkpoint to gemm")
    if not keys.boolean("zero_point", default=True):
        raise keys.error("zero_point", False, "AWQ kernels always read zero points; store a symmetric weight as gptq instead")
    return QuantConfig("awq", size, False, checkpoint_format=form, source=keys.source, raw=keys.raw)


def _gptq(keys: _Keys) -> QuantConfig:
    keys.need_four_bits(keys.integer("bits"))
    form = keys.text("checkpoint_format", "format", default="gptq").lower() or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise keys.error("checkpoint_format", form, "only gptq and gptq_v2 are read; convert the checkpoint")
    dynamic = keys.raw.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not str(rule).startswith("-:") for rule in dynamic):
        raise keys.error("dynamic", "with per-module overrides", "only exclusions ('-:...') are read; use one setting for all")
    return QuantConfig(
        "gptq",
        keys.group_size("group_size"),
        keys.boolean("sym", default=True),
        keys.boolean("desc_act", default=False),
        form,
        source=keys.source,
        raw=keys.raw,
    )


def _compressed(keys: _Keys) -> QuantConfig:
    groups = keys.raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise keys.error("config_groups", groups, "it must describe at least one group of layers; mend the file")
    schemes = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise keys.error(where, group, "it must have an object `weights`; mend the file")
        if group.get("input_activations") is not None:
            raise keys.error(f"{where}.input_activations", "set", "only weight-only INT4 is read; activations must be null")
        form = group.get("format") or keys.text("format", default="")
        if form != "pack-quantized":
            raise keys.error("format", form, "only pack-quantized is read; save the checkpoint in that format")
        schemes.append(_scheme(_Keys(keys.source, group["weights"], f"{where}.weights."), keys))
    if any(s != schemes[0] for s in schemes):
        raise keys.error("config_groups", "with differing schemes", "only one scheme for all layers is read")
    return schemes[0]


def _scheme(weights: _Keys, keys: _Keys) -> QuantConfig:
    weights.need_four_bits(weights.integer("num_bits"))
    if weights.text("type", default="int") != "int":
        raise weights.error("type", weights.raw["type"], "only int is read")
    strategy = weights.text("strategy", default="group" if weights.raw.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", strategy, "only group and channel are read")
    size = -1 if strategy == "channel" else weights.group_size("group_size")
    order = weights.raw.get("actorder")
    if order not in (None, True, False, *_WITH_INDEX, *_WITHOUT_INDEX):
        raise weights.error("actorder", order, f"only {', '.join((*_WITH_INDEX, *_WITHOUT_INDEX))} and null are known")
    return QuantConfig(
        "compressed-tensors",
        size,
        weights.boolean("symmetric", default=True),
        order is True or order in _WITH_INDEX,
        "pack-quantized",
        source=keys.source,
        raw=keys.raw,
    )


@dataclass(frozen=True)
class _Keys:
    """Typed access to a JSON object, with errors that name file and key."""

    source: Path
    raw: dict[str, Any]
    prefix: str = ""

    def error(self, key: str, value: object, mend: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.prefix}{key} is {value!r}; {mend}")

    def integer(self, *names: str) -> int:
        value = self._get(names)
        if type(value) is not int:
            raise self.error(names[0], value, "it must be a whole number; mend the file")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._get((name,))
        if value is not None and type(value) is not bool:
            raise self.error(name, value, "it must be true or false; mend the file")
        return default if value is None else value

    def text(self, *names: str, default: str | None = None) -> str:
        value = self._get(names)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(names[0], value, "it must be a string; mend the file")
        return value

    def group_size(self, *names: str) -> int:
        size = self.integer(*names)
        if size != -1 and size <= 0:
            raise self.error(names[0], size, "it must be positive, or -1 for whole columns")
        return size

    def need_four_bits(self, bits: int) -> None:
        if bits != 4:
            raise self.error("bits", bits, "only 4-bit weights are read; quantise to 4 bits")

    def _get(self, names: tuple[str, ...]) -> Any:
        return next((self.raw[n] for n in names if self.raw.get(n) is not None), None)
