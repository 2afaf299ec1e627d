"""What every test shares: the interpreter where there is no GPU, and reasons for what cannot run here."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before any kernel module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = None if torch.cuda.is_available() else pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none")
    extension = "QLAB_VLLM_EXTENSION" in os.environ or importlib.util.find_spec("vllm") is not None
    no_vllm = None if extension else pytest.mark.skip(reason="needs vLLM's extension: install vllm or set QLAB_VLLM_EXTENSION")
    for item in items:
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(no_gpu)
        if no_vllm and "vllm" in item.keywords:
            item.add_marker(no_vllm)
