"""Clocks, power, temperature and the reasons for lower clocks, as nvidia-smi gives them while the GPU works."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from typing import IO

import torch

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""One field under its newer and its older name; a bit mask."""
PERIOD = 1000
"""Milliseconds between two samples."""
_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


class Monitor:
    """One nvidia-smi that reports every second, since to start one takes as long as a cell; nothing where there is none."""

    def __init__(self, device: torch.device) -> None:
        self.last: dict[str, str] = {}
        self.at = 0.0
        self.process: subprocess.Popen[str] | None = None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            threading.Thread(target=self._watch, args=(which(device),), daemon=True).start()

    def __call__(self) -> dict[str, str]:
        """The latest sample and its age; empty before the first."""
        return {**self.last, "age": f"{time.monotonic() - self.at:.1f} s"} if self.last else {}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()

    def _watch(self, gpu: str) -> None:
        for reasons in REASONS:  # the name that the driver does not know ends it at once
            fields = (*FIELDS, reasons)
            query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu, "-lms", str(PERIOD)]
            with contextlib.suppress(OSError):
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(query, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                if self.process.stdout is not None and self._read(self.process.stdout, fields):
                    return

    def _read(self, lines: IO[str], fields: tuple[str, ...]) -> bool:
        """Samples until the end; whether there was one."""
        for line in lines:
            if sample := parse(line, fields):
                self.last, self.at = sample, time.monotonic()
        return bool(self.last)


def which(device: torch.device) -> str:
    """The GPU as nvidia-smi's -i takes it: it counts every GPU of the machine, PyTorch those of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else str(torch.cuda.current_device())


def parse(line: str, fields: tuple[str, ...]) -> dict[str, str]:
    """One line of nvidia-smi's, by field; empty for any other line."""
    values = [v.strip() for v in line.split(",")]
    if len(values) != len(fields) or not values[0].endswith("MHz"):
        return {}
    return {**dict(zip(fields[:-1], values, strict=False)), "clocks lowered by": decode(values[-1])}


def decode(mask: str) -> str:
    """The names in a bit mask as nvidia-smi prints it; the mask itself where it is not one."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return mask
    names = [name for bit, name in _BITS.items() if bits & bit]
    return ", ".join(names) if names else mask if bits else "nothing"
