"""Settings of quantised checkpoints: which parts differ, which mixtures exist, which checkpoints are known."""

import json
import shutil
from dataclasses import replace

import pytest

from qlab.attribution.settings import PARTS, SHIPPED, Between, Settings, declared, known, text
from qlab.data import model_directory
from qlab.errors import QlabError
from qlab.quantize.model import Options

AWQ, GPTQ = SHIPPED["awq"], SHIPPED["gptq"]
ORDERED = Settings("gptq", symmetric=True, group_size=64, act_order=True)


def names(between):
    return tuple(p.name for p in between.parts)


def test_only_parts_that_differ_are_factors():
    assert names(Between(AWQ, GPTQ)) == ("algorithm", "zero points", "clipping")
    assert names(Between(GPTQ, ORDERED)) == ("group size", "act-order")
    assert names(Between(AWQ, AWQ)) == ()
    assert names(Between(GPTQ, replace(GPTQ, damping=0.1))) == ("algorithm",)
    assert {f for p in PARTS for f in p.attributes} | {"dtype"} == set(Settings.__dataclass_fields__)


def test_clipping_goes_before_awq_does_and_act_order_comes_after_gptq():
    between = Between(AWQ, GPTQ)  # bits: algorithm 1, zero points 2, clipping 4
    assert [m for m in range(8) if between.admissible(m)] == [0, 2, 4, 5, 6, 7]
    back = Between(GPTQ, AWQ)
    assert [m for m in range(8) if back.admissible(m)] == [0, 1, 2, 3, 5, 7]
    ordered = Between(AWQ, ORDERED)  # algorithm 1, zero points 2, group size 4, act-order 8, clipping 16
    assert ordered.admissible(16 + 1)
    assert ordered.admissible(16 + 8 + 1)
    assert not ordered.admissible(16 + 8)
    assert not ordered.admissible(8 + 1)


def test_a_mixture_has_each_part_from_its_side():
    between = Between(AWQ, ORDERED)
    assert between.settings(0) == AWQ
    assert between.settings(31) == ORDERED
    assert between.settings(2 + 16) == replace(AWQ, symmetric=True, clip=False)
    assert between.settings(1 + 4 + 16) == Settings("gptq", symmetric=False, group_size=64)
    with pytest.raises(QlabError, match="clipping belongs to awq, not to gptq"):
        between.settings(1)


def test_texts_differ_where_settings_do():
    for a, b in ((AWQ, ORDERED), (GPTQ, replace(ORDERED, group_size=-1, damping=0.1, static_groups=True))):
        for part in Between(a, b).parts:
            assert text(part, a) != text(part, b)
    assert [text(p, AWQ) for p in PARTS] == [
        *("AWQ", "fitted to each group", "128 rows", "rows as they lie", "ranges searched"),
    ]


def test_impossible_settings_give_one_sentence():
    for change, said in (
        ({"algorithm": "hqq"}, "'hqq' is none of awq, gptq, rtn"),
        ({"algorithm": "rtn", "act_order": True, "clip": False}, "act-order"),
        ({"algorithm": "rtn"}, "clipping belongs to awq"),
        ({"dtype": "float64"}, "'float64' is none of"),
    ):
        with pytest.raises(QlabError, match=said):
            replace(AWQ, **change)
    with pytest.raises(QlabError, match="within one dtype"):
        Between(AWQ, replace(GPTQ, dtype="bfloat16"))


def test_in_words():
    assert str(AWQ) == "AWQ, asymmetric, groups of 128, clipped"
    assert str(replace(ORDERED, group_size=-1)) == "GPTQ, symmetric, whole columns, act-order"


def test_options_are_the_quantizers():
    assert AWQ.options() == Options("awq", symmetric=False)
    assert ORDERED.options() == Options("gptq", 64, act_order=True, clip=False)


def test_shipped_checkpoints_and_their_copies_are_known(tmp_path, flip):
    for kind, settings in SHIPPED.items():
        shutil.copytree(model_directory(kind), tmp_path / kind)
        assert known(model_directory(kind)) == known(tmp_path / kind) == settings
    flip(tmp_path / "awq", "model.layers.1.mlp.down_proj.qweight", 3, 1, 1)
    assert known(tmp_path / "awq") is None
    assert known(model_directory("fp16")) is None
    config = tmp_path / "gptq" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 1}))
    assert known(tmp_path / "gptq") is None


def test_declared_takes_from_files_what_they_say(awq, gptq):
    assert declared(awq, clip=True) == Settings("awq", symmetric=False, group_size=32, clip=True)
    assert declared(gptq) == Settings("gptq", symmetric=True, group_size=32)
    assert declared(gptq, "rtn") == Settings("rtn", symmetric=True, group_size=32)
    assert declared(model_directory("awq"), clip=True) == AWQ
    assert declared(model_directory("gptq")) == GPTQ
