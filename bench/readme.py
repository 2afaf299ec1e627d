"""Fill the tables of README.md and docs/ from the files under ``results/``: ``python -m bench.readme``.

A table stands between ``<!-- table: FILE kernels -->`` and ``<!-- end -->``; other openings are ``<!-- table: FILE pairs
KERNEL,... -->``, ``<!-- table: FILE against -->``, ``<!-- speed: FILE KERNEL,... -->``, those of bench/readme_logprobs.py,
bench/readme_attribution.py and bench/readme_layers.py and, with a FILE alone, ``perplexity``, ``recordings``, ``proof``,
``replay`` and ``cross``. A test fails when a page does not hold what this writes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from bench import readme_attribution, readme_layers, readme_logprobs
from qlab.lab.results import LabResult
from qlab.report.markdown import against_table, caption, kernel_table, pair_table, table
from qlab.report.terminal import number, share
from qlab.serial import write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS = {**readme_logprobs.KINDS, **readme_attribution.KINDS, **readme_layers.KINDS}
KINDS = "|".join(("table|perplexity|recordings|speed|proof|replay|cross", *OTHERS))
BLOCK = re.compile(
    rf"(<!-- ({KINDS}): (\S+)(?: (kernels|pairs|against))?(?: (\S+))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def filled(text: str) -> str:
    """README's text with every table made anew."""
    return BLOCK.sub(_block, text)


def _block(found: re.Match[str]) -> str:
    opening, kind, file, what, keys, closing = found.groups()
    path = ROOT / file
    if kind == "table":
        body = _lab(path, what, keys)
    elif kind == "speed":
        body = _speed(path, keys.split(","))
    elif kind in OTHERS:
        body = OTHERS[kind](path, keys or "")
    else:
        files = {
            "perplexity": _perplexity,
            "recordings": _recordings,
            "proof": _proof,
            "replay": _replay,
            "cross": _cross,
        }
        body = files[kind](path)
    return f"{opening}\n{body}\n\n{closing}"


def _lab(path: Path, what: str, keys: str | None) -> str:
    r = LabResult.read(path)
    if what == "pairs":
        body = pair_table(r, keys.split(",") if keys else ())
    else:
        body = kernel_table(r) if what == "kernels" else against_table(r)
    return f"{body}\n\n<sub>{caption(r)}. From `{path.relative_to(ROOT)}`.</sub>"


def _perplexity(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [[e["model"], f"{e['perplexity']:.3f}"] for e in result["entries"]]
    versions = f"torch {result['environment']['torch']}"
    note = f"{result['tokens']:,} tokens of `{result['text']}`, float32, {versions}. From `{path.relative_to(ROOT)}`."
    return f"{table(['model', 'perplexity'], rows)}\n\n<sub>{note}</sub>"


def _recordings(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [[f"`{k['name']}`", *(str(k[c]) for c in ("problems", "repeatable", "equal"))] for k in result["kernels"]]
    body = table(["kernel", "problems", "repeatable on both", "of these, bitwise equal"], rows)
    where = " and ".join(f"{gpu}, driver {driver}" for gpu, driver in zip(result["gpus"], result["drivers"], strict=True))
    return f"{body}\n\n<sub>{where}; vLLM extension {result['extension'][:16]}. From `{path.relative_to(ROOT)}`.</sub>"


def _proof(path: Path) -> str:
    """Whole kernels against their replays, a row for each family."""
    result = json.loads(path.read_text())
    rows = []
    for f in result["families"]:
        counts = [f["problems"], f["comparisons"], f["outputs"], f["differing_bits"], f["sampled"], f["unreachable"]]
        rows.append([f["name"], *(f"{c:,}" for c in counts)])
    header = ["kernels", "problems", "kernels x problems", "outputs compared", "**bits that differ**", "atomic outputs sampled"]
    e = result["environment"]
    where = f"{e['gpu']}, driver {e['driver']}, torch {e['torch']}, triton {e['triton']}"
    build = f"vLLM {result['extension']['version']}, sha256 {result['extension']['sha256'][:16]}"
    failed = f"{len(result['failures'])} failures" if result["failures"] else "no failures"
    note = f"{where}, {build}; {result['done']:,} of {result['planned']:,} tasks, {failed}. From `{path.relative_to(ROOT)}`."
    return f"{table([*header, 'of these from no order'], rows)}\n\n<sub>{note}</sub>"


def _replay(path: Path) -> str:
    """The engines' speed on one M and K, in billions of multiply-accumulates per second."""
    result = json.loads(path.read_text())
    entries = [e for e in result["entries"] if not e["reason"]]
    engines = list(dict.fromkeys((e["engine"], e["isa"], e["threads"]) for e in entries))
    columns = list(dict.fromkeys((e["dtype"], e["step"]) for e in entries))
    speeds = {(e["engine"], e["isa"], e["threads"], e["dtype"], e["step"]): e["macs_per_second"] / 1e9 for e in entries}
    rows = []
    for engine, isa, threads in engines:
        found = [speeds.get((engine, isa, threads, *c)) for c in columns]
        name = f"`{engine}` {isa}".strip() + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
        rows.append([name, *("-" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.2g}" for v in found)])
    header = [f"M = {entries[0]['M']}, K = {entries[0]['K']}", *(f"{dtype}, {step.upper()}'s" for dtype, step in columns)]
    e = result["environment"]
    where = f"{e['gpu']}, driver {e['driver']}; {e['cpu']}" if e["gpu"] else e["cpu"]
    note = f"{where}, {result['cores']} cores, torch {e['torch']}. From `{path.relative_to(ROOT)}`."
    return f"{table(header, rows)}\n\n<sub>{note}</sub>"


def _cross(path: Path) -> str:
    """Pairs of paths per shape, in fp16: share of differing outputs and relative L2, with what was predicted in brackets."""
    result = json.loads(path.read_text())
    shapes = [s for s in result["shapes"] if s["dtype"] == "fp16"]
    what = list(dict.fromkeys(p["what"] for s in shapes for p in s["pairs"]))
    rows = []
    for s in shapes:
        pairs = {p["what"]: p for p in s["pairs"]}
        cells = []
        for name in what:
            p = pairs.get(name)
            said = "" if not p or not p["predicted"] else f" ({share(p['predicted'][1])})"
            cells.append("-" if p is None else f"{share(p['differing'] / p['outputs'])}{said}, {number(p['relative_l2'])}")
        rows.append([f"{s['M']}, {s['K']}, {s['N']}", *cells])
    cpu = result["environment"]["cpu"]
    note = f"fp16, AWQ weights in groups of {shapes[0]['group_size']}; replayed on {cpu}. From `{path.relative_to(ROOT)}`."
    return f"{table(['M, K, N', *what], rows)}\n\n<sub>{note}</sub>"


def _speed(path: Path, kernels: list[str]) -> str:
    """Median microseconds, and how many times as fast as cuBLAS fp16 in the same run."""
    result = json.loads(path.read_text())
    shapes = list(dict.fromkeys((e["K"], e["N"], e["M"]) for e in result["entries"]))
    speeds = {(e["K"], e["N"], e["M"], e["kernel"]): e["speed"] for e in result["entries"]}
    rows = []
    for k, n, m in shapes:
        cells = [speeds[(k, n, m, name)] for name in kernels]
        figures = [f"{1e6 * s['median']:.1f} ({s['speedup']['cublas']:.2f})" if s else "-" for s in cells]
        rows.append([f"{k} x {n}", str(m), *figures])
    body = table(["K x N", "M", *(f"`{name}`" for name in kernels)], rows)
    e = result["environment"]
    where = f"{e['gpu']}, driver {e['driver']}, torch {e['torch']}, triton {e['triton']}, {result['dtype']}"
    return f"{body}\n\n<sub>{where}, group {result['group_size']}. From `{path.relative_to(ROOT)}`.</sub>"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        write_whole(page, filled(page.read_text()).encode())


if __name__ == "__main__":
    main()
