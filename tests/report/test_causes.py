"""The causes of noise on a terminal, as Markdown and as curves."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from qlab import environment
from qlab.errors import QlabError
from qlab.logprobs.causes import DISPATCH, KERNELS, REPLAY, SCHEMA, SERIES, Causes, Setting
from qlab.logprobs.statistics import Figure
from qlab.report import causes

SHARES = (0.0, 1e-4, 1e-2)


def figure(v, prompts=8):
    return Figure(v, v * 0.75, v * 1.25, 0, prompts) if prompts > 1 else Figure(v, math.nan, math.nan, 0, 1)


def result(prompts=8, noise=1.0):
    """Noise grows with the share; replay has none of the kernels'."""
    settings = []
    for share in SHARES:
        for i, name in enumerate(SERIES):
            n = noise * (share + (0 if name == REPLAY else 0.01 * (i + 1)))
            n, ratio = (figure(n, prompts), figure(0.04 / n, prompts)) if n else (Figure(0, 0, 0), Figure(*[math.inf] * 3))
            settings.append(Setting(name, share, figure(0.04, prompts), n, ratio, ("awq@a100 to awq@h100",)))
    where = environment.collect(details=False)
    methods = ("awq", "awq_marlin")
    return Causes(SCHEMA, {}, where, ("awq [one]",), methods, "a100", "h100", prompts, 99, tuple(settings), 1.5)


def printed(c, width=80):
    out = io.StringIO()
    causes.show(c, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_every_figure_is_whole(width):
    c = result()
    text = printed(c, width)
    assert max(map(len, text.splitlines())) <= width
    assert "awq [one]" in text
    assert "8 prompts, 99 rows" in text
    for s in c.settings:
        assert causes.cells.times(s.snr.value) in text
        if s.snr.value < math.inf:
            assert f"[{causes.cells.times(s.snr.low)}, {causes.cells.times(s.snr.high)}]" in text
    for s in (x for x in c.settings if x.share == 0):
        assert causes.cells.small(s.noise.value) in text


def test_each_series_has_its_own_place():
    """Planted: series swapped give another text."""
    c = result()
    swapped = Causes(
        **{
            **vars(c),
            "settings": tuple(
                Setting({KERNELS: DISPATCH, DISPATCH: KERNELS}.get(s.series, s.series), *list(vars(s).values())[1:])
                for s in c.settings
            ),
        }
    )
    assert printed(swapped) != printed(c)
    lines = printed(c, 120).splitlines()
    row = next(line for line in lines if "as vLLM dispatches them on each" in line)
    assert "2.00x" in row
    assert next(line for line in lines if "h100 replays a100's kernels" in line).split()[-2:] == ["0", "inf"]


def test_one_prompt_claims_no_interval():
    text = printed(result(prompts=1))
    assert "one prompt" in text
    assert "1 prompt, 99 rows" in text
    assert "nan" not in text


def test_markdown_has_a_row_per_share():
    text = causes.markdown(result())
    assert text.count("\n| 0.01 |") == text.count("\n| 0.0001 |") == 1
    assert "\n| 0 |" not in text
    assert "4.00x [3.00x, 5.00x]" in text


@pytest.mark.parametrize("prompts", [1, 8])
def test_the_curves_are_drawn(tmp_path, prompts):
    for suffix in ("png", "svg"):
        causes.plot(result(prompts), tmp_path / f"c.{suffix}")
        assert (tmp_path / f"c.{suffix}").stat().st_size > 5000
    with pytest.raises(QlabError, match="no image format here"):
        causes.plot(result(), tmp_path / "c.gif")


def test_without_noise_there_is_no_curve(tmp_path):
    assert causes.drawable(result())
    assert not causes.drawable(result(noise=0.0))
    with pytest.raises(QlabError, match="nothing to draw"):
        causes.plot(result(noise=0.0), tmp_path / "c.png")
