"""Small subjects for two paths: a random layer, the shipped model or another one on a few tokens, and their hybrids."""

from __future__ import annotations

import torch

from qlab.attribution.explain import OneWeight, explain
from qlab.attribution.hybrids import Hybrids
from qlab.attribution.subject import Layer, Model
from qlab.attribution.weights import weight_factors
from qlab.engine.path import Path
from qlab.inputs import random_activations, random_weight
from qlab.logprobs.engines import default_directory

CPU = torch.device("cpu")
PROMPT = (5, 600, 7, 1900, 12, 40)


def paths(*texts):
    return tuple(map(Path.parse, texts))


def layer(a, b, m=3, k=512, n=256, group=128, *, rows=None, symmetric=False, device=CPU, **options):
    """One random layer for both paths."""
    weight = random_weight(k, n, group, symmetric=symmetric, seed=3, name="w").to(device)
    x = random_activations(rows or m, k, seed=4).to(device)
    return Layer(weight, x, *paths(a, b), m=m, **options)


def weights_of(a, b, one=None, other=None):
    """What lies between two checkpoints, the shipped ones that the paths serve unless they are named."""
    one, other = one or default_directory(a), other or one or default_directory(b)
    return OneWeight(one) if one == other else weight_factors(one, other, requantize=False)


def model(a, b, one=None, other=None, *, prompts=(PROMPT,), forced=2, device=CPU, **options):
    """A model on a few tokens with what lies between its checkpoints."""
    a, b = paths(a, b)
    weights = weights_of(a, b, one, other)
    return Model(weights, a, b, prompts, forced=forced, device=device, **options), weights


def ends(subject, a, b, full=0):
    """Both ends, each against the hybrid that has none or all of B's parts."""
    hybrids = Hybrids(subject, *paths(a, b), full)
    return subject.end(0, hybrids.choice(0, ())), subject.end(1, hybrids.choice(full, hybrids.parts))


def explained(subject, a, b, weights=None, **options):
    """The whole answer."""
    return explain(subject, *paths(a, b), weights or OneWeight(), where="here", **options)
