"""A colour for each class of a map: the class of the base in blue, the others apart from it and from their neighbours."""

from __future__ import annotations

import colorsys

from qlab.attribution.map_result import Strip

BASE = "#0b5fa5"
NOTHING, OPAQUE = "#ffffff", "#b8b8b8"
"""No kernel runs; a library's sum."""
HATCHES = {"opaque": "////", "atomics": "....", "fixed": "", "none": ""}
FIRST = ("#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#8bd3f0")
"""Okabe and Ito's but for the blue, which colour-blind people tell apart."""


def colour(strip: Strip, function: int) -> str:
    """The colour of a class, as #rrggbb."""
    if function < 0:
        return NOTHING
    if strip.functions[function].state == "opaque":
        return OPAQUE
    if function == 0:
        return BASE
    if function <= len(FIRST):
        return FIRST[function - 1]
    beyond = function - len(FIRST)
    hue = (0.7 + 0.8 * (0.618034 * beyond % 1.0)) % 1.0  # golden steps around all hues but the base's
    r, g, b = colorsys.hls_to_rgb(hue, (0.78, 0.62, 0.46)[beyond % 3], 0.55)
    return f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"


def ink(back: str) -> str:
    """Black or white, whichever reads better on ``back`` (WCAG's relative luminance)."""
    parts = [int(back[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return "#ffffff" if 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18 else "#000000"
