from __future__ import annotations

import pytest
import torch

from cegate.engine.runtime import pick_device
from cegate.errors import ConfigError


def test_a_gpu_with_an_index_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cpu") == torch.device("cpu") and pick_device("cuda") == torch.device("cuda")
    assert chosen == []
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(ConfigError, match=r"run\.device=cuda:2 is not there; this machine has 2 GPUs"):
        pick_device("cuda:2")
