"""The verdict by replay: the generator's class survives, others are excluded, and every altered row shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.errors import QlabError
from qlab.logprobs.row_bench import Layer, RowBench
from qlab.logprobs.row_record import check_places
from qlab.logprobs.rows import SCHEMA, Replayed, verify_by_replay
from qlab.serial import from_plain, to_plain
from tests.logprobs.row_cases import LAYERS, flipped, paths, recorded, run

CANDIDATES = paths(
    "awq@a100 awq@h100 awq@h200 awq_marlin@a100 awq_marlin@h100 awq_marlin@h200 awq_marlin@h100:vllm "
    "gptq@a100 gptq_marlin@a100 gptq_marlin@h100"
)
CLASSES = {
    "awq@a100": {"awq@a100"},
    "awq@h100": {"awq@h100", "awq@h200"},
    "awq_marlin@a100": {"awq_marlin@a100"},
    "awq_marlin@h200": {"awq_marlin@h100", "awq_marlin@h200"},
    "awq_marlin@h100:vllm": {"awq_marlin@h100:vllm"},
    "gptq_marlin@h100": {"gptq_marlin@h100"},
}


@pytest.mark.parametrize("generator", CLASSES)
def test_the_generators_class_survives_and_no_other(generator: str) -> None:
    """H100 and H200 are one class; A100 and H100 are not, with 24 rows."""
    found = verify_by_replay(recorded(generator), LAYERS, CANDIDATES)
    assert [set(c) for c in found.survivors] == [CLASSES[generator]]
    assert found.sentence.startswith("consistent with class")
    by_path = {t.path: t for t in found.candidates}
    for path, t in by_path.items():
        assert t.rows == 24
        if path in CLASSES[generator]:
            assert (t.verdict, t.equal, t.mismatch) == ("survives", 24, None)
        else:
            assert t.verdict == "excluded"
            assert t.mismatch is not None
            assert t.mismatch.recorded != t.mismatch.replayed
    assert {"awq@h100", "awq@h200"} in [set(c) for c in found.classes]


def test_atomics_survive_by_reach_alone() -> None:
    found = verify_by_replay(recorded("gptq@a100", 12), LAYERS, [*CANDIDATES, *paths("gptq@h100")])
    assert [set(c) for c in found.survivors] == [{"gptq@a100", "gptq@h100"}]
    survivor = next(t for t in found.candidates if t.path == "gptq@a100")
    assert (survivor.equal, survivor.possible) == (0, 12)
    assert "not every row" in found.sentence
    exact = verify_by_replay(recorded("gptq_marlin@a100", 12), LAYERS, CANDIDATES)
    assert [t.verdict for t in exact.candidates if t.path.startswith("gptq@")] == ["excluded"]


def test_one_flipped_bit_excludes_everyone() -> None:
    rows = recorded("awq@a100")
    rows[7] = flipped(rows[7], 100)
    found = verify_by_replay(rows, LAYERS, CANDIDATES)
    assert found.survivors == ()
    assert "the nearest, awq@a100, agrees on 23 of 24" in found.sentence
    mismatch = next(t.mismatch for t in found.candidates if t.path == "awq@a100")
    assert mismatch is not None
    assert (mismatch.linear, mismatch.sequence, mismatch.position, mismatch.element) == (*rows[7].tap, 100)
    assert int(mismatch.recorded, 16) ^ int(mismatch.replayed, 16) == 1
    x = rows[3].x.clone()
    x.view(torch.int16)[5] ^= 1 << 9
    assert verify_by_replay([replace(rows[3], x=x)], LAYERS, paths("awq@a100")).survivors == ()


def test_digests_do_for_rows() -> None:
    whole, short = recorded("awq@h100", 12), recorded("awq@h100", 12, whole=False)
    found = verify_by_replay(short, LAYERS, CANDIDATES)
    assert found.digests == 12
    assert found.survivors == verify_by_replay(whole, LAYERS, CANDIDATES).survivors
    assert [t.verdict for t in found.candidates if t.path.startswith("gptq@")] == ["undecided"]
    assert "stay undecided" in found.sentence
    altered = [replace(short[0], digest=bytes(16)), *short[1:]]
    assert verify_by_replay(altered, LAYERS, paths("awq@h100")).survivors == ()


def test_what_cannot_be_replayed_stays_undecided() -> None:
    rows = [replace(r, M=300, row=200) for r in recorded("awq@h100", 12)]
    found = verify_by_replay(rows, LAYERS, paths("awq@h100 awq_marlin@h100"))
    opaque, other = found.candidates
    assert (opaque.verdict, opaque.rows) == ("undecided", 0)
    assert "opaque: cuBLAS" in opaque.reason
    assert other.verdict == "excluded"
    assert found.survivors == ()
    both = verify_by_replay([rows[0], *recorded("awq@h100", 12)[1:]], LAYERS, paths("awq@h100"))
    assert (both.candidates[0].verdict, both.candidates[0].rows) == ("survives", 11)
    assert both.candidates[0].reason.startswith("1 rows not tested")


def test_the_wrong_place_is_caught() -> None:
    """By the schedule always; by its own bounds; by the bits where the trees of two places differ."""
    made, rows = run("awq_marlin@a100"), recorded("awq_marlin@a100")
    check_places(rows, made.steps)
    r = rows[0]
    for wrong in (replace(r, row=r.row ^ 1, M=r.M + 1), replace(r, M=r.M + 1), replace(r, tap=r.tap._replace(position=999))):
        with pytest.raises(QlabError, match="says that it is row"):
            check_places([wrong], made.steps)
    with pytest.raises(QlabError, match="which none is"):
        verify_by_replay([replace(r, row=r.M)], LAYERS, CANDIDATES)
    moved = [replace(r, M=128, row=0) for r in rows if r.tap.linear.endswith("gate_up_proj")]
    found = verify_by_replay(moved, LAYERS, paths("awq_marlin@a100"))
    assert found.survivors == ()
    assert found.candidates[0].equal < len(moved)


def test_rows_that_do_not_fit_are_refused() -> None:
    row = recorded("awq@a100")[0]
    for wrong, message in (
        (replace(row, x=row.x[:-1]), "x is"),
        (replace(row, y=row.y.bfloat16()), "y is"),  # type: ignore[union-attr]
        (replace(row, tap=row.tap._replace(linear="model.layers.9.o_proj")), "model.layers.9"),
    ):
        with pytest.raises(QlabError, match=message):
            verify_by_replay([wrong], LAYERS, CANDIDATES)
    for rows, candidates in (([], CANDIDATES), ([row], []), ([row], [CANDIDATES[0]] * 2)):
        with pytest.raises(QlabError):
            verify_by_replay(rows, LAYERS, candidates)


def test_a_bias_is_added_where_the_path_adds_it() -> None:
    """Inside of Marlin, behind awq_gemm: the engine's own linear says the same."""
    from qlab.engine.linear import Linear

    layer = LAYERS(paths("awq@a100")[0], "model.layers.0.self_attn.o_proj")
    bias = torch.linspace(-1, 1, layer.weight.N).half()
    bench, x = RowBench(Layer(layer.weight, bias)), torch.stack([r.x for r in recorded("awq@a100", 0)[1:36:12]])
    for path in paths("awq@a100 awq_marlin@h100 awq_marlin@h100:vllm"):
        whole = torch.zeros((9, layer.weight.K), dtype=torch.float16)
        whole[[2, 8]] = x[:2]
        linear = Linear(layer.weight, path, torch.device("cpu"), native=False, bias=bias)
        assert torch.equal(bench.replay(path, [(2, 9), (8, 9)], x[:2]), linear.run(whole)[[2, 8]])


def test_the_result_survives_json() -> None:
    found = verify_by_replay(recorded("awq@a100"), LAYERS, CANDIDATES[:4])
    assert found.schema == SCHEMA
    assert from_plain(Replayed, to_plain(found)) == found
