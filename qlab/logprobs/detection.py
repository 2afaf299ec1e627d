"""Which candidate made a trace, from its log-probabilities alone: a test per candidate, and a verdict with its error rate.

Each candidate re-executes the trace's tokens; d_c[s] is the distance between trace and re-execution on prompt s. Tokens of a
prompt hang together, so that prompts are the unit: n prompts allow no p below 1 / 2^n, and 7 are the fewest for p < 0.01.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlab.compare import equivalence_classes
from qlab.engine.run import Scored
from qlab.errors import QlabError
from qlab.logprobs.distance import Rows, chosen, compare, norm
from qlab.logprobs.statistics import Array, Figure, mean
from qlab.logprobs.telling import Telling, tell

EXACT = 14
"""Prompts up to which all 2^n sign vectors are taken."""
FLIPS = 20000
FAR = 2.0
SCHEMA = "qlab.logprobs.verdict/1"


@dataclass(frozen=True)
class Candidate:
    """One candidate, or the class of candidates whose re-executions have equal bits."""

    members: tuple[str, ...]
    distance: Figure
    """From the trace, mean over prompts."""
    p: float
    """Of the hypothesis that a member generated the trace. 1 where there is no other class to prefer."""
    identical: bool
    """Every compared log-probability of the trace has this class's bits."""
    equal_rows: float
    """Share of rows on which all bits agree."""


@dataclass(frozen=True)
class Verdict:
    """What the log-probabilities say, provided that one of the candidates generated the trace."""

    schema: str
    answer: str
    """``consistent`` (all bits agree with one class), ``named`` (the test leaves one class) or ``undecided``."""
    classes: tuple[tuple[str, ...], ...]
    """The classes that are left; a member of a class is never told from the others."""
    error_rate: float
    """Bound on the probability that the generator is in none of ``classes``."""
    sentence: str
    candidates: tuple[Candidate, ...]
    prompts: int
    smallest_p: float
    """No p can be smaller with this number of prompts."""
    top_k: int | None
    decimals: int | None
    tellings: tuple[Telling, ...] = ()
    """The nearest class against each other one: ROC, AUC, and tokens that would tell them apart with noise as large as here."""


def detect(
    trace: Sequence[Scored],
    candidates: Mapping[str, Sequence[Scored]],
    *,
    alpha: float = 0.01,
    rows: Rows = "all",
    top_k: int | None = None,
    decimals: int | None = None,
) -> Verdict:
    """Judge a trace by every candidate's re-execution of its tokens, in the trace's own order of steps or all prefilled.

    Args:
        alpha: largest probability of rejecting the true candidate.
        top_k: use so many log-probabilities per row, as an API gives.
        decimals: round to so many decimals, as an API does.

    Raises QlabError naming the candidate that re-executed other tokens, fewer sequences or gave NaN.
    """
    if not candidates or not trace:
        raise QlabError("a verdict needs a trace with at least one sequence, and at least one candidate")
    if not 0 < alpha < 1:
        raise QlabError(f"alpha {alpha}: name an error rate between 0 and 1")
    scores, digests, equal = {}, {}, {}
    for label, again in candidates.items():
        if len(again) != len(trace):
            raise QlabError(
                f"candidate {label} re-executed {len(again)} of the trace's {len(trace)} sequences; give it all of them"
            )
        try:
            pairs = [compare(a, b, top_k=top_k, decimals=decimals) for a, b in zip(trace, again, strict=True)]
        except QlabError as e:
            raise QlabError(f"candidate {label}: {e}") from None
        kept = [chosen(a, rows) for a in trace]
        scores[label] = np.array([norm(c.distances[r]) for c, r in zip(pairs, kept, strict=True)])
        if not np.isfinite(scores[label]).all():
            raise QlabError(f"candidate {label}: some of its log-probabilities or the trace's are not finite; leave it out")
        values = hashlib.sha256()
        for c, r in zip(pairs, kept, strict=True):
            values.update(c.values[r].contiguous().numpy().tobytes())
        digests[label] = values.hexdigest()
        rights = np.concatenate([c.identical[r].numpy() for c, r in zip(pairs, kept, strict=True)])
        equal[label] = float(rights.mean()) if len(rights) else 1.0
    classes = equivalence_classes(digests)
    p = rejection(np.stack([scores[c[0]] for c in classes]))
    found = tuple(
        Candidate(members, mean(scores[members[0]]), float(pc), equal[members[0]] == 1.0, equal[members[0]])
        for members, pc in zip(classes, p, strict=True)
    )
    answer, left, error, sentence = _judge(found, alpha, len(trace))
    tokens = sum(len(a.ids[chosen(a, rows)]) for a in trace) / len(trace)
    tellings = _tellings([(name(c), scores[c[0]]) for c in classes], tokens)
    return Verdict(SCHEMA, answer, left, error, sentence, found, len(trace), 0.5 ** len(trace), top_k, decimals, tellings)


def _tellings(classes: Sequence[tuple[str, Array]], tokens: float) -> tuple[Telling, ...]:
    """Each other class against the nearest: its distances from the trace are what a wrong claim would show."""
    near, own = min(classes, key=lambda c: c[1].mean())
    return tuple(tell(near, other, "the trace", own, d, tokens) for other, d in classes if other != near)


def rejection(distances: Array, seed: int = 0) -> Array:
    """p-value [candidates] of "this candidate generated the trace", from distances [candidates, prompts].

    If c generated the trace, no other c' is nearer to it on average: x_s = d_c[s] - d_c'[s] has a mean of 0 at most, and in the
    worst case (c' as near as c) is as likely positive as negative, prompt by prompt. The statistic is the largest over c' of
    sum(x) / sqrt(n sum(x^2)), a monotone function of Student's t whose denominator no flip changes. Its null distribution takes
    one sign vector for all c' at once (Westfall and Young's single step), which accounts for the number of candidates without
    dividing by it. All 2^n vectors are taken up to 14 prompts, else 20000 random ones and the observed one.

    A c' more than twice as far from the trace as c on every prompt can only speak for c. It is left out: turned around, its
    differences would look like strong evidence against c and hold p at 2 / 2^n or above. Were it as near as c, it would have to
    be twice as far on all n prompts by chance, which is rarer than the smallest p.
    """
    count, prompts = distances.shape
    signs = _signs(prompts, seed)
    p = np.ones(count)
    for c in range(count):
        near = ~(distances > FAR * distances[c]).all(1)
        near[c] = False
        if not near.any():
            continue
        x = distances[c] - distances[near]  # [c', prompts]
        scale = np.sqrt(prompts * np.square(x).sum(1))
        x = np.divide(x, scale[:, None], out=np.zeros_like(x), where=scale[:, None] > 0)
        statistic = x.sum(1).max()
        if statistic > 0:
            beyond = int(((signs @ x.T).max(1) >= statistic - 1e-12).sum())
            p[c] = beyond / len(signs)
    return p


def _signs(prompts: int, seed: int) -> Array:
    """Sign vectors [flips, prompts], the observed one (all +1) first."""
    if prompts <= EXACT:
        bits = (np.arange(2**prompts)[:, None] >> np.arange(prompts)) & 1
        return np.asarray(1.0 - 2.0 * bits, np.float64)
    drawn = np.random.default_rng(seed).integers(0, 2, (FLIPS, prompts)) * 2.0 - 1.0
    return np.asarray(np.concatenate([np.ones((1, prompts)), drawn]), np.float64)


def _judge(found: Sequence[Candidate], alpha: float, prompts: int) -> tuple[str, tuple[tuple[str, ...], ...], float, str]:
    """Answer, classes left, error rate and the sentence.

    Only the true candidate's rejection is an error, and there is one true candidate, so that the error rate is that of a single
    test however many candidates there are.
    """
    number = "1 prompt" if prompts == 1 else f"{prompts} prompts"
    few = f"; {number} cannot give p < 0.01, 7 can" if prompts < 7 else ""
    for c in found:
        if c.identical:
            error = max((o.p for o in found if o is not c), default=1.0)
            if len(found) == 1:
                rate = "there is no other class to tell it from"
            elif error <= alpha:
                rate = f"the others are rejected at p <= {error:.2g}"
            else:
                rate = f"every other class has other bits, but not all are rejected: p up to {error:.2g}{few}"
            return "consistent", (c.members,), error, f"consistent with class {name(c.members)}; {rate}"
    left = tuple(c.members for c in found if c.p > alpha)
    if len(left) == 1 and len(found) > 1:
        return "named", left, alpha, f"class {name(left[0])}, at an error rate of {alpha:g}"
    if len(found) == 1:
        return "undecided", left, alpha, "undecided: all candidates have the same bits, and the trace has others"
    survivors = " and ".join(name(members) for members in left)
    return "undecided", left, alpha, f"undecided between {survivors}, at an error rate of {alpha:g}{few}"


def name(members: Sequence[str]) -> str:
    """``{a, b}``."""
    return "{" + ", ".join(members) + "}"
