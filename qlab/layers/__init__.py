"""A model under two paths, linear by linear: where they part, how that grows, and what reaches the log-probabilities.

``python -m qlab.layers --a awq@h100 --b awq_marlin@h100`` prints it; :func:`qlab.layers.run.run` computes it.
"""
