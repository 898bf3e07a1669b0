from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cegate.compute import pick_device, precision_of, tf32
from cegate.errors import ConfigError


def test_a_gpu_with_an_index_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cpu") == torch.device("cpu") and pick_device("cuda") == torch.device("cuda")
    assert chosen == []
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(ConfigError, match=r"device 'cuda:2' is not there; this machine has 2 GPUs"):
        pick_device("cuda:2")


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"device 'gpu' is unknown; use auto, cpu, cuda or cuda:<index>"):
        pick_device("gpu")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu:0"])
def test_a_device_that_nothing_here_runs_on_is_refused(name):
    with pytest.raises(ConfigError, match=f"device '{name}' is not served; use auto, cpu, cuda or cuda:<index>"):
        pick_device(name)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bfloat16_only_where_the_gpu_itself_has_it(monkeypatch, capability, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert precision_of("auto", torch.device("cuda:1"))[0] == expected
    assert asked == [torch.device("cuda:1")]


def test_the_cpu_computes_in_float32_unless_told_otherwise():
    assert precision_of("auto", torch.device("cpu")) == ("fp32", nullcontext)
    with precision_of("bf16", torch.device("cpu"))[1]():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("by", ["the backend", "the whole program"])
def test_tf32_leaves_alone_what_the_program_has_set(forked, by):
    def look() -> str:
        matmul = torch.backends.cuda.matmul
        return matmul.fp32_precision if by == "the backend" else torch.get_float32_matmul_precision()

    def looks(rank: int) -> list[str]:
        if by == "the backend":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("medium")
        before = look()
        with tf32():
            return [before, look()]

    # in another process: torch takes no such setting back
    ((before, within),) = forked(1, looks)
    assert before == within != ("none" if by == "the backend" else "highest")


def test_tf32_ends_with_its_context_whatever_happens():
    assert not torch.backends.cuda.matmul.allow_tf32
    allowed = []

    def fail() -> None:
        with tf32():
            allowed.append(torch.backends.cuda.matmul.allow_tf32)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert allowed == [True]
    assert not torch.backends.cuda.matmul.allow_tf32
