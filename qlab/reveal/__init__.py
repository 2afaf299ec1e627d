"""What a GEMM computes, found from outside with activations alone: its summation tree, its arithmetic, the place of the scale.

``find`` asks any function of x; ``reveal`` a kernel by name, beside its recipe. After FPRev (arXiv 2411.00442) for the tree.
"""

from qlab.reveal.compare import Difference, difference, settled, tree_hash
from qlab.reveal.find import add_scaling, find
from qlab.reveal.result import Comparison, Evidence, Found, Revealed
from qlab.reveal.run import reveal
from qlab.reveal.scale import scaled_weight, unit_weight
from qlab.reveal.subject import Asked
from qlab.reveal.target import Called, Model, Replayed, Target
from qlab.reveal.topology import RevealError

__all__ = [
    "Asked",
    "Called",
    "Comparison",
    "Difference",
    "Evidence",
    "Found",
    "Model",
    "Replayed",
    "RevealError",
    "Revealed",
    "Target",
    "add_scaling",
    "difference",
    "find",
    "reveal",
    "scaled_weight",
    "settled",
    "tree_hash",
    "unit_weight",
]
