"""Hugging Face directories in and out: AWQ, GPTQ and compressed-tensors 4-bit checkpoints as Int4Weight."""

from qlab.checkpoint.config import METHODS, QuantConfig, quantised
from qlab.checkpoint.llama import FUSED, fused, fused_weight
from qlab.checkpoint.read import Checkpoint, read
from qlab.checkpoint.write import write
from qlab.checkpoint.zeros import ZeroPoints

__all__ = ["FUSED", "METHODS", "Checkpoint", "QuantConfig", "ZeroPoints", "fused", "fused_weight", "quantised", "read", "write"]
