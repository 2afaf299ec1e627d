"""What the quantizers need to know of a layer's inputs: second moments and mean magnitudes, summed over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.errors import QlabError


class Statistics:
    """Running sums over inputs x of one unit (the projections that share an input), kept in float64."""

    def __init__(self, k: int, name: str = "", device: torch.device | str = "cpu") -> None:
        self.name = name
        self.rows = 0
        self.gram = torch.zeros((k, k), dtype=torch.float64, device=device)
        """``X^T X`` [K, K]."""
        self._magnitude = torch.zeros(k, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Count the rows of x [..., K]. Raises QlabError when a value is not finite: it would spoil every sum."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        if not bool(torch.isfinite(rows).all()):
            raise QlabError(f"the activations before {self.name or 'the layer'} are not finite; run the model in float32")
        self.gram += rows.T @ rows
        self._magnitude += rows.abs().sum(0)
        self.rows += rows.shape[0]

    @classmethod
    def of(cls, x: Tensor, name: str = "") -> Statistics:
        """Those of one batch of inputs [rows, K]."""
        statistics = cls(x.shape[-1], name, x.device)
        statistics.add(x)
        return statistics

    @property
    def hessian(self) -> Tensor:
        """``H = 2 X^T X`` [K, K], of the squared output error in each column of the weight (GPTQ, arXiv 2210.17323)."""
        return 2 * self.gram

    @property
    def mean_abs(self) -> Tensor:
        """Mean ``|x|`` of each input channel [K]."""
        return self._magnitude / max(self.rows, 1)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """``||X D||^2`` of each column [N], for a weight difference D [K, N] and ``X^T X``, without the activations themselves."""
    return (difference * (gram @ difference)).sum(0)
