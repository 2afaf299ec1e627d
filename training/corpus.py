"""Text of the shipped model: the Python documentation's reST sources and, if asked for, docstrings of the standard library.

Both are under the PSF licence version 2. Files are split by a hash of their name, so the split never depends on the order of
a directory; docstrings go to the training split only, and no paragraph of the other splits stays in it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "valid", "test")
VALID_PERCENT = 4
TEST_PERCENT = 5
NOT_PROSE = re.compile(r"(^|/)(changelog|contents|license|copyright|genindex|search|download)\.rst\.txt$")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__", "_vendor"}
SHORTEST_SHARED_PARAGRAPH = 60


@dataclass(frozen=True)
class Document:
    """One file's text and the split it belongs to."""

    name: str
    split: str
    text: str


def split_of(name: str) -> str:
    """``train``, ``valid`` or ``test`` from the sha256 of a file's relative name."""
    percent = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    if percent < VALID_PERCENT:
        return "valid"
    return "test" if percent < VALID_PERCENT + TEST_PERCENT else "train"


def documentation(folder: Path) -> list[Document]:
    """Every ``*.rst.txt`` below ``folder`` that is prose, sorted by name. Exits with a sentence when there is none."""
    documents = []
    for path in sorted(folder.rglob("*.rst.txt")):
        name = path.relative_to(folder).as_posix()
        if not NOT_PROSE.search(name):
            documents.append(Document(name, split_of(name), tidy(path.read_text(encoding="utf-8"))))
    if not documents:
        sys.exit(f"{folder} holds no *.rst.txt file; give the _sources folder of Python's HTML documentation")
    return [d for d in documents if d.text]


def docstrings(library: Path) -> list[Document]:
    """One training document per module of the standard library at ``library``: its docstrings, each after its signature."""
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if NOT_LIBRARY.isdisjoint(name.parts[:-1]):
            text = tidy(_module_docstrings(path))
            if len(text) >= 200:
                documents.append(Document(f"docstrings/{name.as_posix()}", "train", text))
    return documents


def without_shared_paragraphs(documents: list[Document]) -> list[Document]:
    """Training documents lose every longer paragraph that stands in a validation or test document too."""
    kept_out = {p for d in documents if d.split != "train" for p in paragraphs(d.text)}
    cleaned = []
    for d in documents:
        if d.split == "train":
            stay = [p for p in paragraphs(d.text) if len(p) < SHORTEST_SHARED_PARAGRAPH or p not in kept_out]
            d = Document(d.name, d.split, "\n\n".join(stay) + "\n")
        cleaned.append(d)
    return cleaned


def excerpt(documents: list[Document], split: str, total_bytes: int, bytes_per_document: int) -> str:
    """About ``total_bytes`` of a split: whole paragraphs from the start of its documents, in the order of their names' hash."""
    chosen, size = [], 0
    for d in sorted((d for d in documents if d.split == split), key=lambda d: hashlib.sha256(d.name.encode()).hexdigest()):
        taken = 0
        for p in paragraphs(d.text):
            length = len(p.encode()) + 2
            if taken + length > bytes_per_document or size + length > total_bytes:
                break
            chosen.append(p)
            taken += length
            size += length
    return "\n\n".join(chosen) + "\n"


def paragraphs(text: str) -> list[str]:
    return [p for p in text.strip("\n").split("\n\n") if p.strip()]


def tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row, one newline at the end."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    body = re.sub(r"\n{3,}", "\n\n", lines).strip("\n")
    return body + "\n" if body else ""


def _module_docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text:
            parts.append(text if isinstance(node, ast.Module) else f"{_signature(node)}\n\n{text}")
    return "\n\n".join(parts)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"
