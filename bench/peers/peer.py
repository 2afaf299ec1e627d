"""What the peers share: their library, found on first use, and where they run."""

from __future__ import annotations

import contextlib
import importlib
import io
from abc import abstractmethod
from importlib import metadata

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support


class Peer(Kernel):
    """A kernel of another library; it packs and runs on a CUDA GPU only."""

    layout = "none"
    package: str = ""
    """Name of its distribution; empty for what comes with PyTorch."""
    module: str = ""
    """Module whose import shows that it is here."""
    dtype: torch.dtype | None = None
    """The only dtype that it takes; None where it takes the run's."""
    slow_start = False
    """Whether it compiles or tunes for minutes: then it runs only what ``bench.warm`` made ready in its time."""

    def __init__(self) -> None:
        self._missing: str | None = None

    def supports(self, problem: Problem, device: torch.device) -> Support:
        if device.type != "cuda":
            return Support(False, "needs a CUDA GPU")
        reason = self.refusal(problem, torch.cuda.get_device_capability(device)) or self.missing()
        return Support(False, reason) if reason else YES

    def missing(self) -> str:
        """Why its library is not here, found out once; empty when it is."""
        if self._missing is None:
            self._missing = self._import()
        return self._missing

    def version(self) -> str:
        return f"{self.package} {metadata.version(self.package)}" if self.package else f"torch {torch.__version__}"

    def _import(self) -> str:
        if not self.module:
            return ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(self.module)
        except ModuleNotFoundError as e:
            root = self.module.partition(".")[0]
            return f"{self.package} is not installed" if e.name in (root, self.module) else f"{self.package}: {e}"
        except Exception as e:  # a library may fail in any way where it is built for other versions
            return f"{self.package} does not load: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        return ""


class Swept(Peer):
    """A kernel with a choice that is made by measuring: every variant is timed, the fastest is the one that counts."""

    @abstractmethod
    def variants(self, packed: Packed) -> tuple[str, ...]:
        """Names of the variants for a packed weight."""

    @abstractmethod
    def run_variant(self, x: Tensor, packed: Packed, variant: str) -> Tensor:
        """As ``run``, by the variant of that name."""

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return self.run_variant(x, packed, self.variants(packed)[0])
