"""The commitment: inclusion with planted faults, the sample that nobody can choose, the price."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
from scipy import stats

from qlab.engine.run import Tap
from qlab.errors import QlabError
from qlab.logprobs import merkle
from qlab.logprobs.row_record import Commitment, Ledger, Opening, check_opening, context
from qlab.logprobs.row_sampling import affordable, choose_taps, cost, place_index
from qlab.serial import from_plain, to_plain
from tests.logprobs.row_cases import NAMES, fed, flipped, prompts, recorded, run


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_every_leaf_is_proved_and_nothing_else(n: int) -> None:
    leaves = [merkle.leaf(i, bytes([i])) for i in range(n)]
    tree = merkle.Tree(leaves)
    for i in range(n):
        proof = tree.prove(i)
        assert merkle.proves(tree.root, n, i, leaves[i], proof)
        for j in range(-1, n + 1):
            assert merkle.proves(tree.root, n, j, leaves[i], proof) == (i == j)
        assert not merkle.proves(tree.root, n, i, merkle.leaf(i, b"other"), proof)
        assert not merkle.proves(tree.root, n, i, leaves[i], (*proof, bytes(32)))
        if proof:
            assert not merkle.proves(tree.root, n, i, leaves[i], proof[:-1])
            assert not merkle.proves(tree.root, n, i, leaves[i], (*proof[:-1], bytes(32)))
            assert not merkle.proves(tree.root, n, i, leaves[i], (*proof[:-1], proof[-1][:31]))
            assert not merkle.proves(tree.root, 2 * n + 1, i, leaves[i], proof)


def test_the_tree_is_that_of_rfc_6962() -> None:
    """Its recursive definition, cut at the largest power of two."""

    def head(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        k = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + head(leaves[:k]) + head(leaves[k:])).digest()

    for n in range(1, 20):
        leaves = [merkle.leaf(i, b"") for i in range(n)]
        assert merkle.Tree(leaves).root == head(leaves)


def test_a_node_is_no_leaf_and_an_index_no_other() -> None:
    a, b = merkle.leaf(0, b"a"), merkle.leaf(1, b"b")
    assert merkle.leaf(0, a + b) != merkle.node(a, b)
    assert merkle.leaf(0, b"a") != merkle.leaf(1, b"a")
    inner = merkle.Tree([merkle.leaf(i, b"x") for i in range(4)])
    assert not merkle.proves(inner.root, 4, 0, inner.levels[1][0], inner.prove(0)[1:])


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    made = run("awq_marlin@h100", 0)
    tokens = [s.tokens.tolist() for s in made.sequences]
    return Ledger(recorded("awq_marlin@h100", 0), NAMES, fed(), context("model", tokens, NAMES, made.steps))


@pytest.mark.parametrize("whole", [True, False])
def test_opened_rows_are_the_committed_ones(ledger: Ledger, whole: bool) -> None:
    c = from_plain(Commitment, to_plain(ledger.commitment))
    taps = choose_taps(c.root + "seed", c.linears, c.fed, 8)
    opening = from_plain(Opening, to_plain(ledger.open(taps, whole=whole)))
    rows = check_opening(c, opening, taps)
    assert tuple(r.tap for r in rows) == taps
    assert all((r.y is not None) == whole for r in rows)
    known = {r.tap: r for r in recorded("awq_marlin@h100", 0)}
    for r in rows:
        assert r.x.equal(known[r.tap].x)
        assert (r.digest, r.row, r.M) == (known[r.tap].digest, known[r.tap].row, known[r.tap].M)


def test_altered_openings_are_refused(ledger: Ledger) -> None:
    c = ledger.commitment
    taps = choose_taps("t", c.linears, c.fed, 3)
    good = ledger.open(taps)
    row, other = good.rows[0], good.rows[1]
    wrong = [
        (replace(row, row=row.row ^ 1), "not the one that was committed"),
        (replace(row, M=row.M + 1), "not the one that was committed"),
        (replace(row, x=row.x[:-2] + ("00" if row.x[-2:] != "00" else "01")), "not the one that was committed"),
        (replace(row, y=row.y[:-2] + ("00" if row.y[-2:] != "00" else "01")), "its digest does not fit"),
        (replace(row, y="", digest="00" * 16), "not the one that was committed"),
        (replace(row, digest=row.digest[:8]), "its digest does not fit"),
        (replace(row, proof=other.proof), "not the one that was committed"),
        (replace(row, proof=()), "hexadecimal, or empty"),
        (replace(row, proof=("zz",)), "hexadecimal, or empty"),
        (replace(row, x="0"), "is no row"),
        (replace(row, dtype="float99"), "is no row"),
        (replace(row, position=row.position + 1000), "is not in the opening"),
        (replace(other, linear=row.linear, sequence=row.sequence, position=row.position), "not the one that was committed"),
    ]
    for bad, message in wrong:
        with pytest.raises(QlabError, match=message):
            check_opening(c, Opening((bad, *good.rows[1:])), taps)
    for forged in (replace(c, root="00" * 32), replace(c, context="11" * 32), replace(c, fed=(c.fed[0] + 1, *c.fed[1:]))):
        with pytest.raises(QlabError):
            check_opening(forged, good, taps)


def test_rows_altered_after_the_commitment_do_not_open(ledger: Ledger) -> None:
    rows = recorded("awq_marlin@h100", 0)
    from qlab.logprobs.row_record import row_digest

    changed = flipped(rows[5], 3)
    assert changed.y is not None
    rows[5] = replace(changed, digest=row_digest(changed.y))
    forged = Ledger(rows, NAMES, fed(), ledger.commitment.context)
    assert forged.commitment.root != ledger.commitment.root
    with pytest.raises(QlabError, match="not the one that was committed"):
        check_opening(ledger.commitment, forged.open([rows[5].tap]), [rows[5].tap])


def test_a_commitment_covers_all_rows() -> None:
    rows = recorded("awq_marlin@h100", 0)
    with pytest.raises(QlabError, match="a commitment covers all"):
        Ledger(rows[:-1], NAMES, fed(), "")
    with pytest.raises(QlabError, match="comes twice"):
        Ledger([*rows, rows[0]], NAMES, fed(), "")


def test_the_context_is_tokens_steps_linears_and_model() -> None:
    steps, tokens = run("awq_marlin@h100", 0).steps, [list(p) for p in prompts()]
    one = context("m", tokens, NAMES, steps)
    others = [
        context("n", tokens, NAMES, steps),
        context("m", [tokens[0], [*tokens[1][:-1], 1]], NAMES, steps),
        context("m", tokens, NAMES[:-1], steps),
        context("m", tokens, NAMES, steps[:-1]),
    ]
    assert len({one, *others}) == 5


def test_the_sample_is_uniform_and_without_replacement() -> None:
    linears, tokens = ("a", "b", "c"), (2, 3)
    everywhere = choose_taps("x", linears, tokens, 15)
    assert len(set(everywhere)) == 15
    assert sorted(place_index(t, linears, tokens) for t in everywhere) == list(range(15))
    assert choose_taps("x", linears, tokens, 4) == everywhere[:4]
    assert choose_taps("y", linears, tokens, 15) != everywhere
    first = Counter(choose_taps(str(seed), linears, tokens, 1)[0] for seed in range(3000))
    assert stats.chisquare([first[t] for t in everywhere]).pvalue > 1e-4
    for count in (0, 16):
        with pytest.raises(QlabError, match="ask for 1 to 15"):
            choose_taps("x", linears, tokens, count)
    for tap in (Tap("d", 0, 0), Tap("a", 2, 0), Tap("a", 0, 2), Tap("a", -1, 0)):
        with pytest.raises(QlabError, match="is no row"):
            place_index(tap, linears, tokens)


def test_the_sample_is_fixed_for_ever() -> None:
    """Generator and verifier may run other versions. The first words of sha256 are 2, 14 and 11 modulo 24."""
    assert choose_taps("qlab", ("a", "b"), (5, 7), 3) == (Tap("a", 0, 1), Tap("a", 1, 2), Tap("b", 1, 0))


def test_a_few_hundred_bytes_per_token() -> None:
    """Llama 8B, 1000 tokens: 32 rows with digests, x counted as it is averaged over the linears."""
    shapes = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
    c = cost(shapes, [1000], 32, whole=False)
    assert c.x == pytest.approx(0.032 * 2 * (3 * 4096 + 14336) / 4)
    assert c.y == pytest.approx(0.032 * 16)
    assert c.proof == pytest.approx(0.032 * 32 * 12)
    assert 400 < c.total < 500
    assert cost(shapes, [1000], 32).y == pytest.approx(0.032 * 2 * (6144 + 4096 + 28672 + 4096) / 4)
    rows = affordable(shapes, [1000], 300, whole=False)
    assert cost(shapes, [1000], rows, whole=False).total <= 300 < cost(shapes, [1000], rows + 1, whole=False).total
    with pytest.raises(QlabError, match="less than one row"):
        affordable(shapes, [10], 10)
