"""vLLM's extension: where it is looked for, and that everything that is missing is a reason, never an exception."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qlab.backends import vllm_extension as ext
from qlab.backends.vllm_extension import Extension, Missing
from qlab.errors import UnsupportedError

NAMED = os.environ.get(ext.EXTENSION_VARIABLE, "")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No extension named, none loaded, nothing remembered."""
    for name in (ext.EXTENSION_VARIABLE, ext.SOURCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    ext.extension.cache_clear()
    yield
    ext.extension.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext, "installed_root", lambda: None)


def reason() -> str:
    found = ext.extension()
    assert isinstance(found, Missing)
    return found.reason


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "needs a CUDA GPU"
    with pytest.raises(UnsupportedError, match="needs a CUDA GPU"):
        ext.operators()


@pytest.mark.usefixtures("gpu", "no_vllm")
def test_nothing_installed_names_both_mends() -> None:
    assert "install the extra vllm" in reason()
    assert ext.EXTENSION_VARIABLE in reason()


@pytest.mark.usefixtures("gpu")
def test_a_path_that_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(tmp_path / "none.so"))
    assert f"{tmp_path / 'none.so'} is not a file" in reason()


@pytest.mark.usefixtures("gpu")
def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(tmp_path / "_C.so"))
    assert f"{tmp_path / '_C.so'} does not load" in reason()


@pytest.mark.usefixtures("gpu")
def test_a_library_without_vllms_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if hasattr(torch.ops._C, "awq_gemm"):
        pytest.skip("vLLM's operators are loaded in this process already")
    (tmp_path / "_C.so").touch()
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(tmp_path / "_C.so"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert "has no operator awq_gemm" in reason()


@pytest.mark.usefixtures("gpu")
def test_an_undefined_symbol_blames_the_torch_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").touch()
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(tmp_path / "_C.so"))

    def load(path: str) -> None:
        raise OSError(f"{path}: undefined symbol: _ZN2at4_ops5zeros4callE")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert f"does not load under torch {torch.__version__}" in reason()
    assert "_ZN2at4_ops5zeros4callE" in reason()


@pytest.mark.usefixtures("gpu")
def test_an_installed_vllm_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('vllm was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ext.installed_root() == package
    assert "has no CUDA kernels" in reason()
    (package / "_C.abi3.so").touch()
    assert ext.find() == package / "_C.abi3.so"
    assert "vllm" not in sys.modules


def test_a_copy_already_loaded_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.so").touch()
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(tmp_path / "other.so"))
    loaded = ModuleType("vllm._C")
    loaded.__file__ = "/somewhere/vllm/_C.abi3.so"
    monkeypatch.setitem(sys.modules, "vllm._C", loaded)
    assert ext.find() == Path("/somewhere/vllm/_C.abi3.so")


def test_a_stand_in_without_a_spec_is_no_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("vllm")
    assert stand_in.__spec__ is None
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    assert ext.installed_root() is None
    stand_in.__spec__ = ModuleSpec("vllm", None)
    assert ext.installed_root() is None


@pytest.mark.usefixtures("gpu", "no_vllm")
def test_what_is_loaded_is_named_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "_C.so"
    path.write_bytes(b"an unknown build")
    sha256 = hashlib.sha256(b"an unknown build").hexdigest()
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(path))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(ext, "NEEDED", ())
    assert ext.extension() == Extension(path, sha256, f"unknown (sha256 {sha256[:16]})")
    ext.extension.cache_clear()
    monkeypatch.setitem(ext._KNOWN, sha256, "0.20.2")
    assert str(ext.extension()) == f"vLLM 0.20.2, sha256 {sha256[:16]}"


@pytest.mark.usefixtures("gpu")
def test_an_unknown_build_of_an_installed_vllm_has_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"an unknown build")
    monkeypatch.setattr(ext, "installed_root", lambda: tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(ext, "NEEDED", ())
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"9.9.9 of {package}")
    found = ext.extension()
    assert isinstance(found, Extension)
    assert found.version == "9.9.9 of vllm"


@pytest.mark.usefixtures("no_vllm")
def test_vllms_source_is_found_from_file_folder_or_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    relative = "model_executor/layers/awq_triton.py"
    assert ext.SOURCE_VARIABLE in getattr(ext.source(relative), "reason", "")
    file = tmp_path / "vllm" / relative
    file.parent.mkdir(parents=True)
    file.touch()
    for named in (file, file.parent, tmp_path / "vllm", tmp_path):
        monkeypatch.setenv(ext.SOURCE_VARIABLE, str(named))
        assert ext.source(relative) == file
    monkeypatch.setenv(ext.SOURCE_VARIABLE, str(tmp_path / "vllm" / "model_executor"))
    assert isinstance(ext.source(relative), Missing)
    monkeypatch.delenv(ext.SOURCE_VARIABLE)
    monkeypatch.setenv(ext.EXTENSION_VARIABLE, str(file.parent / "_C.so"))
    assert ext.source(relative) == file


def test_asking_every_kernel_imports_no_vllm() -> None:
    code = (
        "import sys, torch\n"
        "from qlab.backends.registry import Problem, kernels\n"
        "p = Problem(1, 512, 512, 128, torch.float16, True, False)\n"
        "for k in kernels(): k.supports(p, torch.device('cpu')), k.version()\n"
        "print([m for m in sys.modules if m == 'vllm' or m.startswith('vllm.')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.vllm
def test_the_real_extension_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    if NAMED:
        monkeypatch.setenv(ext.EXTENSION_VARIABLE, NAMED)
    found = ext.extension()
    assert isinstance(found, Extension), found
    assert all(hasattr(ext.operators(), name) for name in ext.NEEDED)
    assert len(found.sha256) == 64
