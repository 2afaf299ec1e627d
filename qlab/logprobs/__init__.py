"""Log-probabilities of an INT4 model: recorded on one path, re-executed on another, compared.

``trace`` keeps what an engine computed; ``record`` makes traces; ``python -m qlab.logprobs`` is the command.
"""
