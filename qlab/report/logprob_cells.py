"""Figures, intervals and reasons as the cells of a terminal's tables."""

from __future__ import annotations

import math

from rich.text import Text

from qlab.logprobs.statistics import Figure
from qlab.logprobs.tables import Entry
from qlab.report.terminal import share


def prompts(number: int) -> str:
    """``1 prompt``, ``2 prompts``."""
    return "1 prompt" if number == 1 else f"{number} prompts"


def stacked(e: Entry) -> Text:
    """A cell: its figure, its interval below; a reason in words; how many prompts split."""
    if e.figure is None:
        return reason(e.reason)
    if e.identical:
        return Text("0")
    if not e.figure.infinite:
        return figure_cell(e.figure)
    split = f"{e.figure.infinite} of {e.figure.prompts} split"
    if e.together is None:
        return over("inf", split)
    value, _, ends = figure(e.together).partition(" ")
    return over("inf", f"{split}\nelse {value}" + (f"\n{ends}" if ends else ""))


def figure_cell(f: Figure) -> Text:
    """The value, its interval dim on the next line."""
    return over(small(f.value), "" if f.value == f.low == f.high else interval(f))


def snr_cell(f: Figure) -> Text:
    if f.value == f.low == f.high:
        return Text(times(f.value))
    return over(times(f.value), "one prompt" if math.isnan(f.low) else f"[{times(f.low)}, {times(f.high)}]")


def share_cell(f: Figure) -> Text:
    if f.value == f.low == f.high:
        return Text(share(f.value))
    return over(share(f.value), "one prompt" if math.isnan(f.low) else f"[{100 * f.low:.3g}, {100 * f.high:.3g}]%")


def figure(f: Figure) -> str:
    """``3.88e-2 [3.1, 4.4]e-2`` in one line."""
    return small(f.value) if f.value == f.low == f.high else f"{small(f.value)} {interval(f)}"


def interval(f: Figure) -> str:
    """``[3.1, 4.4]e-2``: both ends in units of the value's power of ten; in full where they are far from it."""
    if math.isnan(f.low):
        return "one prompt" if f.prompts == 1 else "[nan]"
    ends = (f.low, f.high)
    if not all(map(math.isfinite, (f.value, *ends))) or f.value <= 0:
        return f"[{small(f.low)}, {small(f.high)}]"
    power = _power(f.value)
    low, high = (v / 10.0**power for v in ends)
    if not 0.095 <= low <= high < 99.5:
        return f"[{small(f.low)}, {small(f.high)}]"
    return f"[{_two_digits(low)}, {_two_digits(high)}]" + (f"e{power}" if power else "")


def small(v: float) -> str:
    """``3.88e-2``; 0, inf and nan in their words; from 1 to 999 without a power."""
    if v == 0 or not math.isfinite(v):
        return f"{v:g}"
    if 0.9995 <= abs(v) < 999.5:
        return f"{v:.2f}" if abs(v) < 9.995 else f"{v:.1f}" if abs(v) < 99.95 else f"{v:.0f}"
    mantissa, _, exponent = f"{v:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def times(v: float) -> str:
    """``81x``, ``1.26x``."""
    if not math.isfinite(v):
        return f"{v:g}"
    return f"{v:.0f}x" if 99.95 <= v < 1e6 else f"{v:.2f}x" if 0.01 <= v < 1 else f"{small(v)}x"


def count(v: float) -> str:
    """Tokens: ``23,040``."""
    return f"{v:,.0f}" if math.isfinite(v) and v < 1e7 else small(v)


def short_reason(text: str) -> str:
    """Why there is no figure; of an opaque sum its library alone: the JSON has the whole sentence."""
    return " ".join(text.split()[:2]) if text.startswith("opaque: ") else text


def reason(text: str) -> Text:
    """The short reason as a cell."""
    return Text(short_reason(text), style="dim italic")


def _two_digits(v: float) -> str:
    return f"{v:.0f}" if v >= 9.95 else f"{v:.1f}" if v >= 0.995 else f"{v:.2f}"


def _power(v: float) -> int:
    power = int(f"{v:.2e}".partition("e")[2])
    return 0 if 0 <= power < 3 else power


def over(first: str, second: str) -> Text:
    """The second line dim below the first."""
    found = Text(first, justify="right")
    return found.append(f"\n{second}", style="dim") if second else found
