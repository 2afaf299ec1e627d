"""The environment of a result: what a CPU says, and what is asked of a GPU's driver."""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import socket
import stat
import types

import pytest
import torch

from qlab import environment
from qlab.serial import from_plain, to_plain

UUID = "7d9c1f02-0000-1111-2222-333344445555"
SMI = """#!/bin/sh
echo "$@" > "{log}"
[ {status} = 0 ] && echo "580.65.06, 1980 MHz, 2619 MHz, 1980 MHz, 700.00 W"
exit {status}
"""


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A machine whose second GPU is the only one that PyTorch may see, with an nvidia-smi that notes its arguments."""

    def make(status=0):
        log = tmp_path / "asked"
        script = tmp_path / "nvidia-smi"
        script.write_text(SMI.format(log=log, status=status))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        properties = types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, uuid=UUID)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return log

    return make


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has one to report")
def test_without_a_gpu():
    e = environment.collect(details=False)
    assert (e.gpu, e.sms, e.driver, e.clocks) == ("", 0, "", {})
    assert e.torch == torch.__version__
    assert e.python == platform.python_version()
    assert e.cpu
    assert e.packages["numpy"]
    assert from_plain(environment.Environment, to_plain(e)) == e


def test_a_gpu_is_asked_for_by_its_uuid(fake_gpu):
    log = fake_gpu()
    e = environment.collect(details=False)
    assert (e.gpu, e.sms, e.driver) == ("NVIDIA H200", 132, "580.65.06")
    assert e.clocks == {
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "clocks.max.sm": "1980 MHz",
        "power.limit": "700.00 W",
    }
    assert f"-i GPU-{UUID}" in log.read_text()


def test_a_failing_nvidia_smi_costs_nothing_but_its_figures(fake_gpu):
    fake_gpu(status=9)
    e = environment.collect(details=False)
    assert (e.gpu, e.driver, e.clocks) == ("NVIDIA H200", "", {})


def test_details_are_collect_envs_without_names_of_host_or_user():
    text = environment.collect().details
    assert f"torch_version: {torch.__version__}" in text
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text
    assert os.path.expanduser("~") not in text


def test_a_failing_collect_env_is_said(monkeypatch):
    from torch.utils import collect_env

    monkeypatch.setattr(collect_env, "get_env_info", lambda: {}["lscpu"])
    assert environment.collect().details == "torch.utils.collect_env failed: 'lscpu'"


def test_every_field_has_a_value_of_its_type():
    e = environment.collect(details=False)
    for f in dataclasses.fields(e):
        assert type(getattr(e, f.name)).__name__ == f.type.split("[")[0], f.name
