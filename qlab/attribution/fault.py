"""A fault by name."""

from __future__ import annotations

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
