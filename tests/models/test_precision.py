from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cegate.models.precision import precision_of


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
