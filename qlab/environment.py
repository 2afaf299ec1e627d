"""What a result was measured on: machine, GPU, driver, clocks, versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

import qlab


@dataclass(frozen=True)
class Environment:
    """Enough to tell whether two results may be compared."""

    qlab: str
    python: str
    platform: str
    cpu: str
    torch: str
    triton: str
    cuda: str
    """CUDA version of the PyTorch build; empty for a CPU build."""
    gpu: str
    """The driver's name of the GPU; empty without one."""
    sms: int
    driver: str
    clocks: dict[str, str]
    """nvidia-smi's SM and memory clocks and power limit at the time of the run."""
    packages: dict[str, str]
    details: str
    """torch.utils.collect_env, without host names or paths of the user."""


def collect(details: bool = True) -> Environment:
    """This machine's environment. ``details`` adds torch's own report, which takes a few seconds."""
    has_gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if has_gpu else None
    smi = _nvidia_smi(properties) if has_gpu else {}
    return Environment(
        qlab=qlab.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}",
        cpu=_cpu(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        cuda=torch.version.cuda or "",
        gpu=properties.name if properties else "",
        sms=properties.multi_processor_count if properties else 0,
        driver=smi.pop("driver_version", ""),
        clocks=smi,
        packages={name: v for name in ("numpy", "transformers", "tokenizers", "safetensors", "vllm") if (v := _version(name))},
        details=_details() if details else "",
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _nvidia_smi(properties: Any) -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    if not shutil.which("nvidia-smi"):
        return {}
    # By its UUID: nvidia-smi counts every GPU of the machine, PyTorch those of CUDA_VISIBLE_DEVICES.
    uuid = getattr(properties, "uuid", None)
    which = f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else str(torch.cuda.current_device())
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", which]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (v.strip() for v in out.strip().split(",")), strict=False))


def _details() -> str:
    from torch.utils import collect_env

    try:
        info = collect_env.get_env_info()
    except Exception as e:  # collect_env parses tools' output; a new format there must not cost the result
        return f"torch.utils.collect_env failed: {e}"
    keep = ("torch_version", "cuda_compiled_version", "cuda_runtime_version", "nvidia_driver_version", "os", "gcc_version")
    return "\n".join(f"{k}: {getattr(info, k, '')}" for k in keep)
