"""A fault by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One difference between a kernel and its clean recipe and weight."""

    kind: str
    """The part, a colon, what is wrong with it: ``joins: in pairs``."""
    place: str = ""
    """Where, or by how much: ``k=3, n=7 holds code 5 instead of 9``; empty where the kind says it all."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}" if self.place else self.kind


Names = tuple[Fault, ...]
"""Faults that a kernel has together."""


def distinct(names: Iterable[Names]) -> tuple[Names, ...]:
    """Each set of faults once, as it came first: their order says nothing."""
    found: dict[Names, Names] = {}
    for name in names:
        found.setdefault(tuple(sorted(name, key=str)), name)
    return tuple(found.values())
