"""``python -m qlab.kernels --map M``: where a kernel sums otherwise, read off its recipes without running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qlab.command import FIGURES, answer, bar, check_output, parse_shape, recorded, refuse, torch_dtype
from qlab.errors import QlabError

DEFAULTS = {"M": "1:512", "N": "128:14336:128", "K": "128:14336:128", "sms": "1:160"}
KERNELS = "vllm.marlin.awq"
SHAPE, GROUP = "1,4096,4096", 128
USED = ("hw", "kernels", "shape", "group", "dtype", "json", "plot", "map", "values")


def run(typed: Mapping[str, Any], given: Collection[str]) -> None:
    """Check every option, map, print. Raises QlabError naming the option and the mend."""
    refuse(given, [name for name in typed if name not in USED], "does not go with --map; leave it out")
    check_output("--json", typed["json"])
    check_output("--plot", typed["plot"], FIGURES)
    axis, shape = typed["map"], typed["shape"] or [SHAPE]
    if axis not in DEFAULTS:
        raise QlabError(f"--map {axis!r} is none of {', '.join(DEFAULTS)}")
    if len(shape) > 1:
        raise QlabError("--map takes one --shape; the axis that is mapped walks over --values")
    group = GROUP if typed["group"] is None else typed["group"]
    m, k, n = parse_shape(shape[0], group)
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab import environment, hardware
    from qlab.attribution.maps import map_recipes, parse_values
    from qlab.backends.registry import Problem
    from qlab.report import maps as report

    dtype = torch_dtype(typed["dtype"])
    values = parse_values(typed["values"] or DEFAULTS[axis])
    names = [part.strip() for part in (typed["kernels"] or KERNELS).split(",")]
    symmetric = any("gptq" in name for name in names)
    problem = Problem(m, k, n, k if group == -1 else group, dtype, symmetric, act_order=False)
    if not symmetric:
        problem = replace(problem, zero_min=1, zero_max=15)
    arguments = recorded({name: typed[name] for name in USED if name in given and name not in ("json", "plot")})
    with bar("mapping", len(values) * len(names), "recipes") as advance:
        found = map_recipes(
            names,
            axis,
            values,
            problem,
            hardware.gpu(typed["hw"]),
            environment=environment.collect(details=False),
            arguments=arguments,
            advance=lambda: advance(1),
        )
    answer(found, typed["json"], lambda: report.show(found, Console()))
    if typed["plot"]:
        report.plot(found, typed["plot"])
