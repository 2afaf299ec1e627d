"""The tensors of one quantised linear, per method: names, dtypes and shapes as one table; checks, reading and packing.

Shapes follow AutoAWQ's gemm layout, AutoGPTQ and compressed-tensors' pack-quantized, as vLLM's loaders register them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qlab.checkpoint.config import QuantConfig
from qlab.checkpoint.files import TensorFiles
from qlab.errors import CheckpointError, QlabError
from qlab.packing import awq, compressed_tensors, gptq
from qlab.packing.gptq import Version
from qlab.weights import ACTIVATION_DTYPES, Int4Weight, sequential_groups

_INT32, _INTS, _FLOATS = ("I32",), ("I64", "I32"), ("F16", "BF16", "F32")
LAYOUTS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "awq": {
        "qweight": (_INT32, ("K", "N/8")),
        "qzeros": (_INT32, ("G", "N/8")),
        "scales": (_FLOATS, ("G", "N")),
    },
    "gptq": {
        "qweight": (_INT32, ("K/8", "N")),
        "qzeros": (_INT32, ("G", "N/8")),
        "scales": (_FLOATS, ("G", "N")),
        "g_idx": (_INTS, ("K",)),
    },
    "compressed-tensors": {
        "weight_packed": (_INT32, ("N", "K/8")),
        "weight_scale": (_FLOATS, ("N", "G")),
        "weight_shape": (_INTS, ("2",)),
        "weight_zero_point": (_INT32, ("N/8", "G")),
        "weight_g_idx": (_INTS, ("K",)),
    },
}
"""Method to part to (safetensors dtypes, axes). K rows in, N columns out, G groups; ``/8`` packs eight codes in an int32."""
ZEROS = {"awq": "qzeros", "gptq": "qzeros", "compressed-tensors": "weight_zero_point"}
_SCALES = {"awq": "scales", "gptq": "scales", "compressed-tensors": "weight_scale"}
_INDEX = {"awq": "", "gptq": "g_idx", "compressed-tensors": "weight_g_idx"}


class Size(NamedTuple):
    K: int
    N: int
    G: int


def modules(files: TensorFiles, method: str) -> tuple[str, ...]:
    """Names of the quantised modules: whatever has at least one part, so that a lost part is missed and not overlooked."""
    found: dict[str, None] = {}
    for name in files:
        module, _, part = name.rpartition(".")
        if part in LAYOUTS[method]:
            found[module] = None
    return tuple(found)


def parts(files: TensorFiles, module: str, method: str) -> dict[str, str]:
    """Part to full tensor name, of the parts that the checkpoint has."""
    return {p: f"{module}.{p}" for p in LAYOUTS[method] if f"{module}.{p}" in files}


def check(files: TensorFiles, module: str, config: QuantConfig) -> Size:
    """K, N and groups of a module from its headers. Raises CheckpointError for missing parts and wrong dtypes or shapes."""
    layout = LAYOUTS[config.method]
    present = parts(files, module, config.method)
    near = files[next(iter(present.values()))]
    optional = set()
    if not config.desc_act or config.group_size == -1:  # one group has one index
        optional.add(_INDEX[config.method])
    if config.method == "compressed-tensors" and config.sym:
        optional.add(ZEROS[config.method])
    for part in layout:
        if part not in present and part not in optional:
            raise CheckpointError(
                f"{near}: tensor '{module}.{part}' is missing, though its module is quantised; fetch the file again"
            )
    size = _size(files, module, config)
    for part, name in present.items():
        dtypes, axes = layout[part]
        header, shape = files.header(name), tuple(_length(a, size) for a in axes)
        if header.dtype not in dtypes or header.shape != shape:
            raise CheckpointError(
                f"{files[name]}: tensor {name!r} must be {' or '.join(dtypes)} {list(shape)} for K={size.K}, N={size.N}, "
                f"group size {config.group_size}, not {header}; fetch the file again or mend {config.source.name}"
            )
    return size


def load(
    files: TensorFiles,
    module: str,
    config: QuantConfig,
    *,
    version: Version,
    dtype: torch.dtype | None = None,
    columns: int | None = None,
    input_scale: Tensor | None = None,
) -> Int4Weight:
    """A module as Int4Weight: all of it, or its first ``columns`` (a multiple of 8). ``version`` is GPTQ's.

    Scales are rounded to nearest to ``dtype`` when given. Raises CheckpointError naming file and tensor.
    """
    size = check(files, module, config)
    n = size.N if columns is None else min(columns, size.N)
    got: dict[str, Tensor] = {}
    for part, name in parts(files, module, config.method).items():
        axes = LAYOUTS[config.method][part][1]
        cut = [_length(a, size._replace(N=n)) if a.startswith("N") else None for a in axes] + [None]
        whole = n == size.N or len(axes) < 2
        got[part] = files.tensor(name) if whole else files.tensor(name, cut[0], cut[1])
    scales, index = _SCALES[config.method], _INDEX[config.method]
    got[scales] = _scales(_place(files, f"{module}.{scales}"), got[scales], dtype)
    if index == "weight_g_idx" and index in got and bool((got[index] == -1).all()):
        del got[index]  # llm-compressor's way to say that this layer has no act-order
    if index in got:
        got[index] = _group_index(_place(files, f"{module}.{index}"), got[index], size)
    try:
        return _unpack(config.method, got, size._replace(N=n), module, version, input_scale)
    except QlabError as e:
        key = f"{module}.{next(iter(LAYOUTS[config.method]))}"
        raise CheckpointError(f"{files[key]}: tensor {key!r} and its companions are no {config.method} weight: {e}") from None


def pack(weight: Int4Weight, method: str, *, version: Version, symmetric: bool, act_order: bool) -> dict[str, Tensor]:
    """A weight's tensors by part. ``symmetric`` and ``act_order`` are the whole checkpoint's, which every module must follow.

    Raises PackingError for what the layout cannot hold.
    """
    if method == "awq":
        a = awq.pack(weight)
        return {"qweight": a.qweight, "qzeros": a.qzeros, "scales": a.scales}
    if method == "gptq":
        g = gptq.pack(weight, version=version)
        return {"qweight": g.qweight, "qzeros": g.qzeros, "scales": g.scales, "g_idx": g.g_idx}
    c = compressed_tensors.pack(weight)
    found = {"weight_packed": c.weight_packed, "weight_scale": c.weight_scale, "weight_shape": c.weight_shape}
    if not symmetric:
        found["weight_zero_point"] = c.weight_zero_point if c.weight_zero_point is not None else _eights(weight)
    if act_order:
        found["weight_g_idx"] = weight.group_index
    return found


def _unpack(
    method: str, got: Mapping[str, Tensor], size: Size, name: str, version: Version, input_scale: Tensor | None
) -> Int4Weight:
    if method == "awq":
        return awq.unpack(awq.AwqTensors(got["qweight"], got["qzeros"], got["scales"]), name=name, input_scale=input_scale)
    if method == "gptq":
        index = got.get("g_idx", sequential_groups(size.K, size.K // size.G))
        tensors = gptq.GptqTensors(got["qweight"], got["qzeros"], got["scales"], index, version)
        return gptq.unpack(tensors, name=name, input_scale=input_scale)
    c = compressed_tensors.CompressedTensors(
        got["weight_packed"],
        got["weight_scale"],
        torch.tensor([size.N, size.K]),
        got.get("weight_zero_point"),
        got.get("weight_g_idx"),
    )
    return compressed_tensors.unpack(c, name=name, input_scale=input_scale)


def _eights(weight: Int4Weight) -> Tensor:
    """The packed zero point 8 of every group, for a symmetric layer in a checkpoint that has asymmetric ones."""
    packed = torch.full((-(-weight.N // 8), weight.groups), 0x88888888 - 2**32, dtype=torch.int32)
    if weight.N % 8:
        packed[-1] &= (1 << 4 * (weight.N % 8)) - 1  # filler nibbles are zero
    return packed


def _size(files: TensorFiles, module: str, config: QuantConfig) -> Size:
    part, (_, axes) = next(iter(LAYOUTS[config.method].items()))
    name = f"{module}.{part}"
    header = files.header(name)
    if len(header.shape) != 2 or 0 in header.shape:
        raise CheckpointError(f"{files[name]}: tensor {name!r} must have two dimensions, not {header}; fetch the file again")
    found = {a[0]: n * (8 if a.endswith("/8") else 1) for a, n in zip(axes, header.shape, strict=True)}
    shape = f"{module}.weight_shape"
    if shape in files and part == "weight_packed" and files.header(shape).shape == (2,):
        n, k = files.tensor(shape).tolist()  # K need not be a multiple of 8 here: the last int32 of a row may be part filler
        if n != found["N"] or not found["K"] - 8 < k <= found["K"]:
            raise CheckpointError(
                f"{files[shape]}: tensor {shape!r} is {[n, k]}, but weight_packed holds {[found['N'], found['K']]}; "
                "fetch the file again"
            )
        found["K"] = k
    groups = config.groups(found["K"])
    if not groups:
        raise CheckpointError(
            f"{files[name]}: tensor {name!r} has K={found['K']}, no multiple of group size {config.group_size}; "
            f"mend {config.source.name}"
        )
    return Size(found["K"], found["N"], groups)


def _place(files: TensorFiles, name: str) -> str:
    return f"{files[name]}: tensor {name!r}"


def _length(axis: str, size: Size) -> int:
    if axis.isdigit():
        return int(axis)
    n = getattr(size, axis[0])
    return -(-n // 8) if axis.endswith("/8") else n


def _scales(what: str, scales: Tensor, dtype: torch.dtype | None) -> Tensor:
    _refuse(what, ~torch.isfinite(scales), "is not finite", "quantise the layer again")
    _refuse(what, scales == 0, "is zero", "quantise the layer again")
    if dtype is None and scales.dtype not in ACTIVATION_DTYPES:
        raise CheckpointError(
            f"{what} is float32, which no kernel takes; pass dtype torch.float16 or torch.bfloat16 to round it"
        )
    rounded = scales.to(dtype or scales.dtype, copy=True)
    _refuse(what, (rounded == 0) | ~torch.isfinite(rounded), f"leaves the range of {dtype}", "read it with another dtype")
    return rounded


def _group_index(what: str, index: Tensor, size: Size) -> Tensor:
    _refuse(what, (index < 0) | (index >= size.G), f"is not in 0 to {size.G - 1}", "quantise the layer again")
    counts = torch.bincount(index.long(), minlength=size.G)
    uneven = counts[index.long()] != size.K // size.G
    _refuse(what, uneven, f"is in a group that has not {size.K // size.G} rows", "quantise the layer again")
    return index.to(torch.int32, copy=True)


def _refuse(what: str, bad: Tensor, is_wrong: str, mend: str) -> None:
    if bool(bad.any()):
        where = [int(i) for i in bad.nonzero()[0]]
        raise CheckpointError(f"{what}: element {where} {is_wrong}; {mend}")
