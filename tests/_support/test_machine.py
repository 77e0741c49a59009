"""What a machine is called."""

from pathlib import Path

import pytest
import torch

from condlr._support import machine

CORE = "processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\nflags\t\t: fpu\n\n"


@pytest.fixture(autouse=True)
def not_known_yet():
    machine._processor.cache_clear()
    yield
    machine._processor.cache_clear()


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("AMD EPYC", "AMD EPYC family 26 model 2, 3 threads"),
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor, 3 threads"),
    ],
)
def test_processors_that_a_virtual_machine_calls_alike_are_told_apart(monkeypatch, name, called):
    text = CORE.format(name=name, family=26, model=2) * 2
    monkeypatch.setattr(Path, "read_text", lambda self, *_: text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine.name(torch.device("cpu")) == called


def test_a_system_without_cpuinfo_has_a_name(monkeypatch):
    def missing(self, *_):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine._processor()


@pytest.mark.parametrize(
    ("flags", "emulates"),
    [("flags\t\t: fpu avx2", True), ("flags\t\t: fpu avx512_bf16", False),
     ("Features\t: fp asimd bf16", False), ("", False)],
)  # fmt: skip
def test_a_processor_without_bfloat16_is_known(monkeypatch, flags, emulates):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: f"processor\t: 0\n{flags}\n" * 2)
    assert machine.emulates_bfloat16(torch.device("cpu")) == emulates
    assert not machine.emulates_bfloat16(torch.device("cuda"))
