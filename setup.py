"""Build of qlab: the package list, the folder of Triton kernels and the compiled module. Metadata is in pyproject.toml."""

from __future__ import annotations

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Listed one by one because kernels/ must not become a package of its own (see qlab/__init__.py).
# tests/test_install.py compares the built wheel with the folders, so a forgotten line fails there.
PACKAGES = [
    "qlab",
    "qlab.backends",
    "qlab.checkpoint",
    "qlab.data",
    "qlab.kernels",
    "qlab.lab",
    "qlab.packing",
    "qlab.quantize",
    "qlab.replay",
    "qlab.report",
    "qlab.triton_kernels",
]

NATIVE = Pybind11Extension(
    "qlab._native",
    ["csrc/native.cpp"],
    depends=["csrc/tensor_core.hpp"],
    cxx_std=17,
    # Replayed arithmetic must be the written one: no contraction into fused multiply-adds, no reordering.
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
)

setup(
    packages=PACKAGES,
    package_dir={"qlab.triton_kernels": "kernels"},
    package_data={"qlab": ["py.typed", "data/**/*"]},
    exclude_package_data={"qlab": ["data/**/__pycache__/*", "data/__pycache__/*"]},
    ext_modules=[NATIVE],
)
