"""The three ways to have qlab: a wheel, an editable install and a bare checkout; and the neighbours it must leave alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import qlab

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = "pip install -e '.[test]' && python -m pytest -n 2 --dist loadfile"
NOT_COPIED = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "results")

IMPORT_KERNELS = """
import importlib, pkgutil, qlab, qlab.triton_kernels as t
names = sorted(m.name for m in pkgutil.iter_modules(t.__path__))
for name in names:
    importlib.import_module(f"qlab.triton_kernels.{name}")
from qlab.replay.step import native_reason
import json
print(json.dumps([qlab.__file__, list(t.__path__), names, native_reason()]))
"""


def python(code: str, cwd: Path, path: list[Path]) -> str:
    """What ``code`` prints in a new interpreter that starts in ``cwd`` and looks into ``path`` first."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# An editable install finds modules for any `qlab`, a wheel's or a bare checkout's too, so it must be out of the way.
WITHOUT_EDITABLE = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def import_kernels(cwd: Path, path: list[Path]) -> tuple[Path, list[Path], list[str], str]:
    """Where qlab and its Triton kernels were imported from, the kernels' modules, and why the compiled module is missing."""
    code = (WITHOUT_EDITABLE if path else "") + IMPORT_KERNELS
    file, folders, names, reason = json.loads(python(code, cwd, path).splitlines()[-1])
    return Path(file).parent, [Path(f) for f in folders], names, reason


def modules(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without anything that a build leaves behind."""
    copy = tmp_path_factory.mktemp("checkout") / "qlab"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that was built from it: what the sdist lacks, the wheel lacks too."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    # Without the CUDA module, which only some machines could build: its own tests compile it.
    env = {**os.environ, "QLAB_BUILD_CUDA": "0"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_every_module_and_data_file(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as z:
        names = set(z.namelist())
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qlab/data").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    expected = {f"qlab/{m}" for m in modules(ROOT / "qlab")} | data | {"qlab/py.typed"}
    expected |= {f"qlab/triton_kernels/{m}" for m in modules(ROOT / "kernels")}
    assert not expected - names, "not in the wheel; is the folder listed in setup.py?"
    extra = {n for n in names - expected if ".dist-info/" not in n}
    assert all(re.fullmatch(r"qlab/_native\.[\w.-]+", n) for n in extra), extra
    assert len(extra) == 1


def test_sdist_holds_kernels_and_sources(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    expected = {p.relative_to(ROOT).as_posix() for f in ("kernels", "csrc") for p in (ROOT / f).glob("*.*")}
    expected |= {"pyproject.toml", "setup.py", "LICENSE", "README.md"}
    assert any(n.startswith("csrc/") for n in expected)
    assert not expected - names
    assert not [n for n in names if n.endswith((".pyc", ".so"))]


def test_wheel_imports(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(built[1]) as z:
        z.extractall(site)
    package, folders, names, reason = import_kernels(tmp_path, [site])
    assert package == site / "qlab"
    assert folders == [site / "qlab/triton_kernels"]
    assert {f"{n}.py" for n in names} == modules(ROOT / "kernels")
    assert reason == ""


def test_bare_checkout_imports(checkout: Path, tmp_path: Path) -> None:
    package, folders, names, reason = import_kernels(tmp_path, [checkout])
    assert package == checkout / "qlab"
    assert folders == [checkout / "kernels"]
    assert {f"{n}.py" for n in names} == modules(ROOT / "kernels")
    assert "compiled module is not there" in reason


def test_editable_install_imports(tmp_path: Path) -> None:
    editable = [d for d in metadata.distributions(name="qlab") if '"editable": true' in (d.read_text("direct_url.json") or "")]
    if not editable:
        pytest.skip("qlab is no editable install in this environment; `pip install -e .` makes it one")
    package, folders, names, reason = import_kernels(tmp_path, [])
    assert package == ROOT / "qlab"
    assert folders == [ROOT / "kernels"]
    assert {f"{n}.py" for n in names} == modules(ROOT / "kernels")
    assert reason == ""
    assert editable[0].version == qlab.__version__


@pytest.fixture(scope="module")
def hugging_face_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Hugging Face's ``kernels`` package and nothing else."""
    site = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), "kernels"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        pytest.skip(f"Hugging Face's kernels package cannot be installed here: {ran.stderr.strip().splitlines()[-1:]}")
    return site


IMPORT_LLAMA = "from transformers import LlamaForCausalLM; import kernels; print(LlamaForCausalLM.__name__, kernels.__file__)"


def test_transformers_imports_in_the_root_with_hugging_face_kernels(hugging_face_kernels: Path) -> None:
    name, file = python(IMPORT_LLAMA, ROOT, [hugging_face_kernels]).split()
    assert name == "LlamaForCausalLM"
    assert Path(file) == hugging_face_kernels / "kernels/__init__.py"


def test_transformers_imports_in_the_root_without_hugging_face_kernels() -> None:
    try:
        metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        assert python(IMPORT_LLAMA, ROOT, []).split() == ["LlamaForCausalLM", "None"]
    else:
        pytest.skip("Hugging Face's kernels package is installed in this environment")


def test_readme_and_ci_run_the_same_test_command() -> None:
    for file in ("README.md", ".ci/run"):
        assert TEST_COMMAND in (ROOT / file).read_text(), file
