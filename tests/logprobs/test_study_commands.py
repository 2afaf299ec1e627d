"""``python -m qlab.logprobs experiment, causes, detect`` as a user meets them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from qlab import data
from qlab.engine.schedule import Batching
from qlab.logprobs.causes import Causes
from qlab.logprobs.detection import Verdict
from qlab.logprobs.engines import Choice
from qlab.logprobs.tables import ExperimentResult
from qlab.logprobs.trace import write
from qlab.serial import from_plain
from tests.logprobs.counted_engine import SHIFTS, Counted
from tests.logprobs.test_trace_commands import call, good, refused

SMALL = ("--count", 2, "--tokens", 6, "--new-tokens", 2)


class Counter:
    """Stands in for engines: counts their runs, and interrupts after some."""

    def __init__(self):
        self.runs, self.stop, self.most = 0, math.inf, {}

    def __call__(self, choice: Choice, batching: Batching) -> Counted:
        p = choice.path
        shift = SHIFTS.get(p.method, 3.0) + 0.25 * (p.gpu == "a100")
        engine = Counted(p, choice.directory, shift=shift, before=self.count, most=self.most.get(p.method, 10**6))
        engine.moved = lambda flip: Counted(p, choice.directory, shift=shift + flip.share, before=self.count)
        return engine

    def count(self):
        if self.runs >= self.stop:
            raise KeyboardInterrupt
        self.runs += 1


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    made = Counter()
    monkeypatch.setattr(Choice, "make", lambda self, batching: made(self, batching))
    return made


def strict(path: Path):
    """JSON without Python's own constants."""

    def constant(name):
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=constant)


def test_an_experiment(counter, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    options = ("experiment", *SMALL, "--methods", "awq,gptq", "--out", out)
    text = good(*options, "--json", tmp_path / "r.json", "--plot", tmp_path / "p.svg", width=120)
    for title in ("Noise floor", "Within A100, prefill", "Within H100, decode", "Across A100 and H100", "Detection"):
        assert title in text
    r = ExperimentResult.read(out / "result.json")
    assert strict(out / "result.json") == strict(tmp_path / "r.json")
    assert [d.path for d in r.dispatched] == [f"{m}@{g}" for g in ("a100", "h100") for m in ("awq", "gptq")]
    assert (r.prompts.count, r.prompts.tokens, r.prompts.new_tokens, r.top_k) == (2, 12, 2, 5)
    assert {b.schedule for b in r.tables.batches} == {"whole", "token by token", "beside another"}
    assert {p.name for p in out.iterdir()} == {"runs", "result.json", "paths.png", "within.png", "roc.png"}
    assert "<svg" in (tmp_path / "p.svg").read_text()
    before = counter.runs
    again = good(*options, width=120)
    assert counter.runs == before, "every run was kept"
    first, second = ([line for line in t.splitlines() if " s " not in line] for t in (text, again))
    assert first == second


def test_an_interrupted_experiment_goes_on(counter, tmp_path: Path) -> None:
    options = ("experiment", *SMALL, "--methods", "awq,gptq", "--temperature", 0.8, "--seed", 3)
    good(*options, "--out", tmp_path / "whole")
    runs, counter.runs, counter.stop = counter.runs, 0, 37
    stopped = call(*options, "--out", tmp_path / "cut")
    assert stopped.exit_code not in (0, 2)
    assert not (tmp_path / "cut" / "result.json").exists()
    counter.runs, counter.stop = 0, math.inf
    good(*options, "--out", tmp_path / "cut")
    assert counter.runs == runs - 37
    whole, cut = (strict(tmp_path / name / "result.json") for name in ("whole", "cut"))
    for r in (whole, cut):
        for name in ("seconds", "environment"):
            del r[name]
        del r["arguments"]["out"]
    assert whole == cut


def test_one_gpu_one_prompt(counter, tmp_path: Path) -> None:
    options = ("--count", 1, "--tokens", 6, "--new-tokens", 2, "--hw", "h100", "--no-batches")
    text = good("experiment", *options, "--out", tmp_path, width=80)
    assert "Across" not in text
    assert "another batch" not in text
    assert "one prompt" in text
    assert "nan" not in text
    r = ExperimentResult.read(tmp_path / "result.json")
    assert r.tables.across == r.tables.full == ()
    assert math.isnan(r.tables.within[0].off_diagonal.mean.low)
    assert (tmp_path / "paths.png").stat().st_size > 5000


def test_kernels_by_their_names_and_one_of_any_checkpoint(counter, tmp_path: Path) -> None:
    good("experiment", *SMALL, "--hw", "H100", "--methods", "triton.awq_gemm,reference.float64", "--json", tmp_path / "r.json")
    r = ExperimentResult.read(tmp_path / "r.json")
    assert [d.path for d in r.dispatched] == ["triton.awq_gemm@h100", "reference.float64@h100"]
    assert [m.split()[0] for m in r.models] == ["awq"], "both run the AWQ checkpoint"


def test_what_cannot_run_says_why(awq, gptq, tmp_path: Path) -> None:
    """On the tiny model: vLLM's awq and gptq take fp16 alone."""
    options = (
        "--awq",
        awq,
        "--gptq",
        gptq,
        "--hw",
        "h100",
        "--dtype",
        "bf16",
        "--json",
        tmp_path / "r.json",
        "--no-batches",
    )
    text = good("experiment", *SMALL, *options, "--methods", "awq,gptq,reference.float64", "--device", "cpu", width=120)
    assert "Did not run" in text
    r = ExperimentResult.read(tmp_path / "r.json")
    for d in r.dispatched:
        assert d.path.startswith("reference") or d.reason.endswith(f"vLLM's {d.path.partition('@')[0]} takes fp16 only")
    for m in r.tables.within:
        for key, row in zip(m.keys, m.cells, strict=True):
            for other, e in zip(m.keys, row, strict=True):
                assert (e.figure is None) == ("fp16 only" in e.reason) == (key != other or not key.startswith("reference"))


def test_long_chunks_are_opaque(gptq, tmp_path: Path) -> None:
    options = (
        "--gptq",
        gptq,
        "--methods",
        "gptq",
        "--hw",
        "h100",
        "--dispatch",
        "vllm",
        "--chunk",
        60,
        "--json",
        tmp_path / "r.json",
    )
    text = good("experiment", "--count", 1, "--tokens", 60, "--new-tokens", 1, *options, "--device", "cpu", width=100)
    assert "opaque: cuBLAS" in text
    (d,) = ExperimentResult.read(tmp_path / "r.json").dispatched
    assert d.path == "gptq@h100:vllm"
    assert d.reason.startswith("opaque: cuBLAS")


def test_causes(counter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("causes", *SMALL, "--shares", "1e-1,1e-2,1e-2", "--generator", "A100", "--out", out)
    text = good(*options, "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png", width=100)
    c = Causes.read(out / "causes.json")
    assert strict(out / "causes.json") == strict(tmp_path / "c.json")
    assert (c.generator, c.verifier, c.prompts, c.tokens) == ("a100", "h100", 2, 14)
    assert sorted({s.share for s in c.settings}) == [0, 0.01, 0.1]
    assert "h100 replays a100's kernels" in text
    assert {p.name for p in out.iterdir()} == {"runs", "causes.json", "causes.png"}
    before = counter.runs
    good(*options)
    assert counter.runs == before


MALFORMED = [
    ("experiment --hw h900", "unknown GPU 'h900'"),
    ("experiment --hw h100,H100", "--hw 'h100,h100' names h100 twice; name each once"),
    ("experiment --hw ,", "--hw ',': name one or more, separated by commas"),
    ("experiment --methods awq,,gptq", "--methods 'awq,,gptq': name one or more, separated by commas"),
    ("experiment --methods awq,gptq,awq", "--methods 'awq,gptq,awq' names awq twice; name each once"),
    ("experiment --methods awq_exllama", "unknown method 'awq_exllama'"),
    ("experiment --dispatch mine", "dispatch 'mine' is neither pinned nor vllm"),
    ("experiment --engine sglang", "--engine 'sglang' is neither builtin nor vllm"),
    ("experiment --engine vllm --device cpu", "--engine vllm needs a CUDA GPU"),
    ("experiment --device tpu", "--device 'tpu' is neither cuda nor cpu"),
    ("experiment --dtype float8", "--dtype 'float8' is not one of float16, fp16, bfloat16, bf16"),
    ("experiment --top-k 2049", "--top-k 2049: the model has 2048 token ids; name 2048 or fewer"),
    ("experiment --temperature inf", "the temperature must be 0 (greedy) or a positive number, not inf"),
    ("experiment --plot p.gif", "--plot p.gif: name a .png, .svg or .pdf file"),
    ("experiment --json absent/r.json", "--json absent/r.json: the folder"),
    ("experiment --prompts absent.txt", "cannot read the prompts absent.txt: No such file"),
    ("experiment --prompts absent.txt --count 2", "--count belongs to the held-out text"),
    ("experiment --tokens 1", "12 prompts of 1 tokens: ask for 1 or more of 2 or more tokens"),
    ("experiment --awq absent", "absent is not a directory"),
    ("causes --shares much", "--shares 'much': name numbers between 0 and 1, separated by commas"),
    ("causes --shares 0.1,2", "--shares 0.1,2: name numbers above 0 and up to 1"),
    ("causes --shares 0", "--shares 0: name numbers above 0 and up to 1"),
    ("causes --shares nan", "--shares nan: name numbers above 0 and up to 1"),
    ("causes --shares ,", "--shares ,: name numbers above 0 and up to 1"),
    ("causes --methods awq", "--methods awq: name two methods, separated by a comma"),
    ("causes --methods awq,awq", "--methods 'awq,awq' names awq twice"),
    ("causes --methods awq,other", "unknown method 'other'"),
    ("causes --verifier h900", "unknown GPU 'h900'"),
    ("causes --generator h900", "unknown GPU 'h900'"),
    ("causes --top-k 3000", "--top-k 3000: the model has 2048 token ids"),
    ("causes --plot p", "--plot p: name a .png, .svg or .pdf file"),
    ("detect absent --candidates awq@h100", "cannot read the trace absent: No such file"),
    ("detect absent --candidates awq", "'awq' is no method@gpu, for example awq_marlin@h100"),
    ("detect absent --candidates awq@h100,", "--candidates 'awq@h100,': name one or more, separated by commas"),
    ("detect absent --candidates awq@h100,awq@H100:pinned", "--candidates 'awq@h100,awq@h100' names awq@h100 twice"),
    ("detect absent --candidates awq@h100:mine", "dispatch 'mine' is neither pinned nor vllm"),
    ("detect absent --candidates awq@h100 --alpha 1", "--alpha 1: name an error rate between 0 and 1"),
]


@pytest.mark.parametrize(("typed", "said"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_a_bad_option_is_one_sentence_and_nothing_is_made(tmp_path: Path, monkeypatch, typed: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    built = "sglang" in typed or "tpu" in typed or "float8" in typed or "vllm" in typed
    assert refused(*typed.split(), *(() if built else ("--out", tmp_path / "out"))).startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["experiment", "causes", "detect"])
def test_an_out_that_cannot_be_a_folder(tmp_path: Path, counter, command) -> None:
    (tmp_path / "file").write_text("")
    given = SMALL
    if command == "detect":
        good("record", "--out", tmp_path / "t", *SMALL)
        given = (tmp_path / "t", "--candidates", "awq@h100")
    for target in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        text = refused(command, *given, "--out", target)
        assert text.startswith(f"--out {target}: ")
        assert text.endswith("; name a folder that can be made and written")
    assert counter.runs == (command == "detect"), "the recording alone"


def other_vocabulary(folder: Path, family: str) -> Path:
    shutil.copytree(data.model_directory(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
    return folder


def test_checkpoints_of_two_models(tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path / "wide", "gptq")
    text = refused("experiment", *SMALL, "--gptq", other)
    assert text.startswith("awq (2048 token ids) and wide (4096 token ids) are not checkpoints of one model")
    assert refused("causes", *SMALL, "--gptq", other, "--methods", "awq,gptq") == text


def test_detect(counter, tmp_path: Path) -> None:
    t = tmp_path / "t"
    good("record", "--out", t, "--method", "awq_marlin", "--count", 7, "--tokens", 6, "--new-tokens", 2, "--digests")
    detect = ("detect", t, "--candidates")
    text = good(*detect, "awq_marlin@h200,awq_marlin@h100,awq@h100", "--json", tmp_path / "v.json", "--out", tmp_path / "d")
    v = from_plain(Verdict, strict(tmp_path / "v.json"))
    assert (v.answer, v.classes, v.prompts) == ("consistent", (("awq_marlin@h200", "awq_marlin@h100"),), 7)
    assert v.sentence.endswith("the others are rejected at p <= 0.0078")
    assert v.sentence in " ".join(text.replace("\u2502", " ").split())
    runs = counter.runs
    good(*detect, "awq_marlin@h200,awq_marlin@h100,awq@h100", "--out", tmp_path / "d")
    assert counter.runs == runs
    assert "all candidates have the same bits, and the trace has others" in good(*detect, "awq@h100,awq@h200", width=200)
    assert "4 decimals" in good(*detect, "awq@h100", "--decimals", 4, "--top-k", 2, "--mode", "prefill", width=200)
    assert refused(*detect, "awq@h100", "--top-k", 6) == (
        "--top-k 6: the trace lists 5 log-probabilities per row; name 5 or fewer"
    )
    assert refused(*detect, "awq@h100", "--mode", "both") == "mode 'both' is neither decode nor prefill"
    counter.most = {"gptq": 3}
    assert refused(*detect, "awq@h100,gptq@a100").startswith("candidate gptq@a100 cannot be computed here (opaque: cuBLAS")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dispatch", "vllm"), "consistent with class {awq_marlin@h100, awq_marlin@h100:vllm}"),
        (("--temperature", 0.8, "--seed", 5), "consistent with class {awq_marlin@h100, awq_marlin@h100:vllm}"),
        (("--top-k", "all"), "consistent with class {awq_marlin@h100, awq_marlin@h100:vllm}"),
        (("--chunk", 8, "--together", 1), "consistent with class {awq_marlin@h100, awq_marlin@h100:vllm}"),
        (("--hw", "a100"), "at an error rate of 0.01; 2 prompts cannot give p < 0.01, 7 can"),
    ],
)
def test_traces_of_every_kind(counter, tmp_path: Path, options, expected) -> None:
    good("record", "--out", tmp_path / "t", "--method", "awq_marlin", *SMALL, *options)
    candidates = "awq_marlin@h100,awq@h100,awq_marlin@h100:vllm"
    assert expected in good("detect", tmp_path / "t", "--candidates", candidates, width=300)


def test_a_trace_with_rows(counter, made, tmp_path: Path) -> None:
    """Its rows of both sequences are not asked for again."""
    write(made, tmp_path / "t")
    text = good("detect", tmp_path / "t", "--candidates", "awq_marlin@h100,awq@h100", width=300)
    assert "consistent with class {awq@h100}" in text  # the engine without a model made it, unmoved


def test_one_sequence(counter, tmp_path: Path) -> None:
    good("record", "--out", tmp_path / "t", "--method", "awq", "--count", 1, "--tokens", 6, "--new-tokens", 2)
    text = good("detect", tmp_path / "t", "--candidates", "awq@h100,awq_marlin@h100", width=300)
    assert "not all are rejected: p up to 0.5; 1 prompt cannot give p < 0.01, 7 can" in text
    assert "1 prompt, smallest p 0.5" in text


def test_a_damaged_trace_and_one_of_another_model(counter, tmp_path: Path) -> None:
    good("record", "--out", tmp_path / "t", *SMALL)
    detect = ("detect", tmp_path / "t", "--candidates", "awq@h100")
    other = other_vocabulary(tmp_path / "wide", "awq")
    assert "has 2048 token ids, wide 4096; name a checkpoint of the same model" in refused(*detect, "--awq", other)
    file = tmp_path / "t" / "sequences.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 4
    file.write_bytes(raw)
    assert refused(*detect).startswith(f"{file} was damaged or edited")


def test_help() -> None:
    for command in ("experiment", "causes", "detect"):
        assert "--out" in good(command, "--help", width=200)
