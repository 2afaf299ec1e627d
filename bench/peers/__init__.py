"""Kernels of other libraries as peers of the benchmark, one file each; a library that is not installed is a reason.

A peer is a :class:`qlab.backends.registry.Kernel` that is not in the registry: it has no recipe and serves nothing but the
benchmark. A new one is one file in this folder with a tuple ``PEERS``; nothing else needs an edit.
"""

from __future__ import annotations

import importlib
import pkgutil

from bench.peers.peer import Peer, Swept


def peers() -> tuple[Peer, ...]:
    """Every peer, by name. No library is imported before a peer of it is asked whether it runs."""
    found: list[Peer] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found += getattr(importlib.import_module(f"{__name__}.{module}"), "PEERS", ())
    return tuple(sorted(found, key=lambda p: p.name))


__all__ = ["Peer", "Swept", "peers"]
