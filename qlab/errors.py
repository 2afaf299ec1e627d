"""Errors a person can mend: one clear sentence that names the file, tensor or option.

Commands print the sentence and exit with status 2; everything else is a bug and keeps its traceback.
"""


class QlabError(ValueError):
    """Base of every error that bad input can cause."""


class WeightError(QlabError):
    """The parts of an :class:`qlab.weights.Int4Weight` do not fit together."""


class PackingError(QlabError):
    """A storage layout cannot hold this weight, or packed tensors are not of that layout."""


class CheckpointError(QlabError):
    """A checkpoint directory is missing, damaged or of an unsupported kind."""


class UnsupportedError(QlabError):
    """A kernel was asked to run a problem that it cannot run here."""
