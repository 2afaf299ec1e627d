"""What the row protocol will need: rates of every pair of paths, and each GPU's rule as a verifier."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File

from qlab import environment
from qlab.engine.path import DispatchMode, Path
from qlab.environment import Environment
from qlab.errors import UnsupportedError
from qlab.lab.run import Layer as LabLayer
from qlab.logprobs.row_counts import Rule, calibrate
from qlab.logprobs.row_errors import ERROR
from qlab.logprobs.row_rates import Rate, measure
from qlab.serial import read_json

SCHEMA = "qlab.rows.predictions/1"
Source = Callable[[], Iterable[LabLayer]]
"""Layers with real or random activations, as often as they are asked for."""


@dataclass(frozen=True)
class Predictions:
    """Every pair, linear and M, and every rule."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    source: str
    """Where weights and activations come from."""
    dtype: str
    rates: tuple[Rate, ...]
    rules: tuple[Rule, ...]
    refused: dict[str, str]
    """Paths and rules that could not be replayed, with the reason."""
    seconds: float
    error: float = field(default=ERROR)

    @classmethod
    def read(cls, path: File) -> Predictions:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)


def predict(
    source: Source,
    methods: Sequence[str],
    gpus: Sequence[str],
    ms: Sequence[int],
    *,
    dispatch: DispatchMode = "pinned",
    described: str = "",
    dtype: str = "float16",
    arguments: dict[str, str] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> Predictions:
    """Rates of all pairs of ``methods`` x ``gpus``; a rule per GPU and M where there are two methods or more.

    ``advance`` is called per layer: once for the rates, and once for each rule. Raises QlabError where nothing can be compared.
    """
    started = time.perf_counter()
    paths = [Path(m, g, dispatch) for g in gpus for m in methods]
    rates, refused = measure(source(), paths, ms, advance=advance)
    rules = []
    for verifier in gpus if len(methods) > 1 else ():
        for m in ms:
            try:
                rules.append(calibrate(source(), methods, verifier, gpus, m, dispatch=dispatch, advance=advance))
            except UnsupportedError as e:
                refused[f"rule of {verifier} for M = {m}"] = str(e)
    seconds = round(time.perf_counter() - started, 1)
    env = environment.collect(details=False)
    return Predictions(SCHEMA, arguments or {}, env, described, dtype, rates, tuple(rules), refused, seconds)
