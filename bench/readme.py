"""Fill the tables of README.md from the files under ``results/``: ``python -m bench.readme``.

A table stands between ``<!-- table: FILE kernels -->`` and ``<!-- end -->``; other openings are ``<!-- table: FILE pairs
KERNEL,... -->``, ``<!-- speed: FILE KERNEL,... -->``, ``<!-- perplexity: FILE -->`` and ``<!-- recordings: FILE -->``. A test
fails when README.md does not hold what this writes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from qlab.lab.results import LabResult
from qlab.report.markdown import caption, kernel_table, pair_table, table
from qlab.serial import write_whole

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(<!-- (table|perplexity|recordings|speed): (\S+)(?: (kernels|pairs))?(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL
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
    else:
        body = {"perplexity": _perplexity, "recordings": _recordings}[kind](path)
    return f"{opening}\n{body}\n\n{closing}"


def _lab(path: Path, what: str, keys: str | None) -> str:
    r = LabResult.read(path)
    body = kernel_table(r) if what == "kernels" else pair_table(r, keys.split(",") if keys else ())
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
    readme = ROOT / "README.md"
    write_whole(readme, filled(readme.read_text()).encode())


if __name__ == "__main__":
    main()
