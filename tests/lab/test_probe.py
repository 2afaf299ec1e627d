"""Every fault that the probe can name, planted by index formulas, is named; anything else is located and not named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends.registry import Kernel, kernel
from qlab.inputs import random_weight
from qlab.lab.faults import hypotheses
from qlab.lab.probe import decode, judge, probe
from qlab.packing import exllama, gptq, nibbles

K, N, GROUP = 128, 64, 32
KERNELS = ("reference.float64", "triton.awq_gemm", "triton.awq_dequantize", "triton.gptq_gemm", "triton.gptq_gemm.v2")
AWQ_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
AWQ_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]


class Faulty(Kernel):
    """A kernel whose packing is another one's: of a damaged weight, or with damaged tensors."""

    def __init__(self, inner, weight=lambda w: w, tensors=lambda packed, w: {}):
        self.inner, self.weight, self.tensors, self.name = inner, weight, tensors, f"faulty {inner.name}"

    def supports(self, problem, device):
        return self.inner.supports(problem, device)

    def pack(self, weight):
        packed = self.inner.pack(self.weight(weight))
        return replace(packed, tensors={**packed.tensors, **self.tensors(packed.tensors, weight)})

    def run(self, x, packed):
        return self.inner.run(x, packed)


def decoded(w):
    """What a kernel without a fault decodes, element by element: float64 products have all their bits."""
    codes, zeros, scales, index = w.codes.tolist(), w.zeros.tolist(), w.scales.tolist(), w.group_index.tolist()
    rows = [[(codes[k][n] - zeros[index[k]][n]) * scales[index[k]][n] for n in range(w.N)] for k in range(w.K)]
    return torch.tensor(rows, dtype=torch.float64).to(w.dtype)


def columns(part, source):
    """Column n of ``part`` becomes its old column ``source(n)``."""
    return lambda w: {part: torch.stack([getattr(w, part)[:, source(n)] for n in range(w.N)], 1)}


def both(*edits):
    return lambda w: {name: t for edit in edits for name, t in edit(w).items()}


def awq_read_naturally(n):
    return n // 8 * 8 + AWQ_COLUMN_OF_NIBBLE[n % 8]


def natural_read_as_awq(n):
    return n // 8 * 8 + AWQ_NIBBLE_OF_COLUMN[n % 8]


def rows_by(source):
    return lambda w: {"codes": torch.stack([w.codes[source(k)] for k in range(w.K)])}


def marlin_grouped(n):
    """out[64 b + 8 i + j] = in[64 b + i + 8 j], its own inverse."""
    return n // 64 * 64 + n % 64 // 8 + 8 * (n % 8)


def marlin_single(n):
    """out[32 b + 8 i + j] = in[32 b + 2 i + [0, 1, 8, 9, 16, 17, 24, 25][j]]."""
    return n // 32 * 32 + 2 * (n % 32 // 8) + [0, 1, 8, 9, 16, 17, 24, 25][n % 8]


def unsorted_rows(w):
    order = sorted(range(w.K), key=lambda k: (int(w.group_index[k]), k))
    return {"codes": w.codes[order], "group_index": w.group_index[order]}


def group_of(source):
    """Each row takes group ``source(row, own group, groups)``."""
    return lambda w: {
        "group_index": torch.tensor([source(k, int(g), w.groups) for k, g in enumerate(w.group_index)], dtype=torch.int32)
    }


PARTS = {
    "codes": ("codes",),
    "zero points": ("zeros",),
    "codes and zero points": ("codes", "zeros"),
    "scales": ("scales",),
    "scales and zero points": ("scales", "zeros"),
}
FAULTS = {
    "codes: AWQ's nibble order where natural order is stored, along rows": rows_by(natural_read_as_awq),
    "codes: natural nibble order where AWQ's is stored, along rows": rows_by(awq_read_naturally),
    "zero points: one too low (stored minus one as in GPTQ v1, read as v2)": lambda w: {"zeros": w.zeros - 1},
    "zero points: one too high (stored as they are as in GPTQ v2, read as v1)": lambda w: {"zeros": w.zeros + 1},
    "zero points: 8 everywhere (an asymmetric weight read as symmetric)": lambda w: {"zeros": w.zeros * 0 + 8},
    "group index: every row takes the next group": group_of(lambda k, g, groups: (g + 1) % groups),
    "group index: every row takes the previous group": group_of(lambda k, g, groups: (g + groups - 1) % groups),
    "group index: groups in reverse": group_of(lambda k, g, groups: groups - 1 - g),
}
for parts in ("codes", "zero points", "codes and zero points"):
    for text, source in (
        ("AWQ's nibble order where natural order is stored", natural_read_as_awq),
        ("natural nibble order where AWQ's is stored", awq_read_naturally),
    ):
        FAULTS[f"{parts}: {text}, along columns"] = both(*(columns(part, source) for part in PARTS[parts]))
for parts in ("scales", "zero points", "scales and zero points"):
    for text, source in (
        ("Marlin's 64-column permutation applied once too often or not at all", marlin_grouped),
        ("Marlin's single-group permutation applied once too often or not at all", marlin_single),
        ("from the next column", lambda n: (n + 1) % N),
        ("from the previous column", lambda n: (n + N - 1) % N),
    ):
        FAULTS[f"{parts}: {text}"] = both(*(columns(part, source) for part in PARTS[parts]))
ACT_ORDER_FAULTS = {
    "group index: ignored (act-order rows read as k // group_size)": group_of(lambda k, g, groups: k // GROUP),
    "group index: rows left in sorted order (activations not permuted)": unsorted_rows,
}


def found(name, edit, weight):
    """The probe's answer when kernel ``name`` packs the edited weight in place of ``weight``; None where it cannot."""
    inner, damaged = kernel(name), replace(weight, **edit(weight))
    if (damaged.act_order or weight.act_order) and inner.layout == "awq":
        return None
    result = probe(Faulty(inner, lambda w: replace(w, **edit(w))), weight)
    if "zero point" in result.reason:  # the fault needs one that the layout does not have
        return None
    assert result.reason == ""
    wrong = decoded(damaged) != decoded(weight)
    assert result.mismatches == int(wrong.sum()) > 0
    assert result.elements == K * N
    assert len(result.faults) == min(8, result.mismatches)
    k, n = wrong.nonzero()[0].tolist()
    first = result.faults[0]
    assert (first.k, first.n) == (k, n)
    assert first.expected == float(decoded(weight)[k, n])
    assert first.got == float(decoded(damaged)[k, n])
    return result


@pytest.fixture(scope="module")
def weight():
    return random_weight(K, N, GROUP, seed=1)


@pytest.fixture(scope="module")
def act_order():
    return random_weight(K, N, GROUP, act_order=True, seed=2)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_wrong_is_nothing_said(name, weight, act_order):
    for w in (weight, act_order):
        result = probe(kernel(name), w)
        if not result.reason:
            assert (result.mismatches, result.diagnosis, result.faults) == (0, "", ())
            assert torch.equal(decode(kernel(name), kernel(name).pack(w), K, w.dtype, w.device), decoded(w))


def test_every_named_fault_is_planted_here(weight, act_order):
    assert {name for name, _ in hypotheses(weight)} == set(FAULTS)
    assert {name for name, _ in hypotheses(act_order)} == {*FAULTS, *ACT_ORDER_FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault, weight):
    answers = [r.diagnosis for name in KERNELS if (r := found(name, FAULTS[fault], weight)) is not None]
    assert answers
    assert set(answers) == {fault}


@pytest.mark.parametrize("fault", [*ACT_ORDER_FAULTS, *(name for name in FAULTS if name.startswith("group"))])
def test_a_planted_group_index_is_named(fault, act_order):
    edit = {**FAULTS, **ACT_ORDER_FAULTS}[fault]
    answers = [r.diagnosis for name in KERNELS if (r := found(name, edit, act_order)) is not None]
    assert len(answers) == 3  # the reference and both GPTQ kernels
    assert set(answers) == {fault}


def natural(values):
    return nibbles.join(values)


PHYSICAL = [
    ("triton.awq_gemm", lambda t, w: {"qweight": natural(w.codes)}, "codes: AWQ's nibble order where natural", False),
    ("triton.awq_gemm", lambda t, w: {"qzeros": natural(w.zeros)}, "zero points: AWQ's nibble order where natural", False),
    (
        "triton.awq_gemm",
        lambda t, w: {"qweight": natural(w.codes), "qzeros": natural(w.zeros)},
        "codes and zero points: AWQ's nibble order where natural",
        False,
    ),
    (
        "triton.gptq_gemm",
        lambda t, w: {"qzeros": nibbles.join(nibbles.even_then_odd(w.zeros - 1))},
        "zero points: natural nibble order where AWQ's is stored, along columns",
        False,
    ),
    (
        "triton.gptq_gemm",
        lambda t, w: {"qweight": exllama.pack(w).qweight},
        "codes: natural nibble order where AWQ's is stored, along rows",
        False,
    ),
    ("triton.gptq_gemm", lambda t, w: {"qzeros": gptq.pack(w, version=2).qzeros}, "zero points: one too high", False),
    ("triton.gptq_gemm.v2", lambda t, w: {"qzeros": gptq.pack(w, version=1).qzeros}, "zero points: one too low", False),
    ("triton.gptq_gemm", lambda t, w: {"qzeros": torch.full_like(t["qzeros"], 0x77777777)}, "zero points: 8 everywhere", False),
    ("triton.gptq_gemm", lambda t, w: {"g_idx": None}, "group index: ignored", True),
    ("triton.gptq_gemm", lambda t, w: {"g_idx": (t["g_idx"] + 1) % w.groups}, "group index: every row takes the next", True),
    (
        "triton.gptq_gemm",
        lambda t, w: {k: getattr(gptq.pack(replace(w, **unsorted_rows(w))), k) for k in ("qweight", "g_idx")},
        "group index: rows left in sorted order",
        True,
    ),
]


@pytest.mark.parametrize(("name", "tensors", "said", "ordered"), PHYSICAL)
def test_a_fault_in_the_packed_tensors_is_named(name, tensors, said, ordered, weight, act_order):
    result = probe(Faulty(kernel(name), tensors=tensors), act_order if ordered else weight)
    assert result.diagnosis.startswith(said)


@pytest.mark.parametrize(
    "pair",
    [
        ("group index: every row takes the next group", "zero points: one too high"),
        ("codes: natural nibble order where AWQ's is stored, along columns", "scales: from the next column"),
        ("scales: Marlin's 64-column", "zero points: 8 everywhere"),
    ],
)
def test_two_faults_at_once_are_not_named(pair, weight):
    edits = [next(e for name, e in FAULTS.items() if name.startswith(p)) for p in pair]

    def twice(w):
        return {**edits[0](w), **edits[1](w)}

    for name in ("reference.float64", "triton.gptq_gemm"):
        result = found(name, twice, weight)
        assert result.diagnosis == f"unnamed fault: rows 0 to {K - 1}, columns 0 to {N - 1}, 4 of 4 groups"


def test_two_swapped_columns_are_located(weight):
    def swap(w):
        codes = w.codes.clone()
        codes[:, [10, 40]] = codes[:, [40, 10]]
        return {"codes": codes}

    assert found("reference.float64", swap, weight).diagnosis.endswith("columns 10 to 40, 4 of 4 groups")


@pytest.mark.parametrize("name", ["reference.float64", "triton.gptq_gemm"])
@pytest.mark.parametrize("ordered", [False, True])
def test_one_scale_by_one_unit_is_located(name, ordered, weight, act_order):
    w = act_order if ordered else weight

    def nudge(w):
        scales = w.scales.clone()
        scales.view(torch.int16)[2, 33] += 1
        return {"scales": scales}

    result = found(name, nudge, w)
    before, after = float(w.scales[2, 33]), float(nudge(w)["scales"][2, 33])
    assert result.diagnosis == f"scales: group 2, n=33 has {after:.9g} instead of {before:.9g}"
    assert {(int(w.group_index[f.k]), f.n) for f in result.faults} == {(2, 33)}


@pytest.mark.parametrize("change", [1, -1, 3])
def test_one_zero_point_is_located(change, act_order):
    def nudge(w):
        zeros = w.zeros.clone()
        zeros[1, 5] = (int(zeros[1, 5]) - 1 + change) % 15 + 1
        return {"zeros": zeros}

    new, old = int(nudge(act_order)["zeros"][1, 5]), int(act_order.zeros[1, 5])
    for name in ("reference.float64", "triton.gptq_gemm", "triton.gptq_gemm.v2"):
        assert found(name, nudge, act_order).diagnosis == f"zero points: group 1, n=5 has {new} instead of {old}"


def test_a_scale_that_turned_negative_is_located(weight):
    def negate(w):
        scales = w.scales.clone()
        scales[0, 0] *= -1
        return {"scales": scales}

    assert found("reference.float64", negate, weight).diagnosis.startswith("scales: group 0, n=0 has -")


def test_single_codes_are_named_one_by_one(weight):
    places = [(0, 0), (17, 3), (17, 4), (127, 63)]

    def flip(w):
        codes = w.codes.clone()
        for k, n in places:
            codes[k, n] ^= 5
        return {"codes": codes}

    said = "; ".join(
        f"k={k}, n={n} holds code {int(weight.codes[k, n]) ^ 5} instead of {weight.codes[k, n]}" for k, n in places
    )
    for name in KERNELS:
        assert found(name, flip, weight).diagnosis == f"codes: {said}"


def test_damage_in_one_group_of_one_column_that_no_value_explains(weight):
    def shuffle(w):
        codes = w.codes.clone()
        codes[32:64, 9] = codes[32:64, 9].flip(0)
        return {"codes": codes}

    diagnosis = found("reference.float64", shuffle, weight).diagnosis
    assert diagnosis.startswith("unnamed fault: rows 3")
    assert diagnosis.endswith("columns 9 to 9: all in group 1, n=9")


def test_the_module_of_a_fused_layer_is_named(weight):
    got = decoded(weight)
    got[7, 40] = decoded(replace(weight, codes=weight.codes ^ 1))[7, 40]
    shards = (("a.q_proj", 32), ("a.k_proj", 16), ("a.v_proj", 16))
    result = judge(got, weight, kernel("reference.float64"), "a.qkv_proj", "key", shards)
    assert result.diagnosis.startswith("codes: k=7, n=40 (column 8 of a.k_proj) holds code")


def test_nan_and_negative_zero(weight):
    clean = decoded(weight)
    zero = (clean == 0).nonzero()[0].tolist()
    got = clean.clone()
    got[zero[0], zero[1]] = -0.0
    assert judge(got, weight, kernel("reference.float64"), "", "").mismatches == 0
    got[3, 3] = float("nan")
    result = judge(got, weight, kernel("reference.float64"), "", "")
    assert result.mismatches == 1
    assert result.diagnosis == "unnamed fault: rows 3 to 3, columns 3 to 3: all in group 0, n=3"


def test_a_trusted_weight_shows_what_the_packed_one_changed(weight):
    suspect = replace(weight, codes=weight.codes.clone())
    suspect.codes[70, 11] ^= 8
    for name in KERNELS:
        assert probe(kernel(name), suspect).mismatches == 0
        result = probe(kernel(name), suspect, weight)
        assert result.mismatches == 1
        assert result.diagnosis.startswith("codes: k=70, n=11 holds code")


def test_bf16_through_the_reference():
    w = random_weight(K, N, GROUP, dtype=torch.bfloat16, seed=3)
    for fault, edit in FAULTS.items():
        assert found("reference.float32", edit, w).diagnosis == fault
