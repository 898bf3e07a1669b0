from __future__ import annotations

import pytest
import torch
from torch import nn

from cegate.engine.milestones import epochs_to_iterations, rate_after, sgd
from cegate.errors import ConfigError


def test_rate_is_that_of_mfnets_fifty_epochs():
    milestones = epochs_to_iterations([25, 35, 45], 1000)
    assert milestones == [24_000, 34_000, 44_000]
    first = {rate_after(0.01, n, milestones): n for n in reversed(range(0, 50_000, 500))}
    assert {n: pytest.approx(rate) for rate, n in first.items()} == {0: 1e-2, 24_000: 1e-3, 34_000: 1e-4, 44_000: 1e-5}


def test_rate_is_torchs():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)
    for iteration in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate_after(0.3, iteration, [3, 7], 0.5))
        optimizer.step(), schedule.step()


def test_milestones_out_of_order_are_refused():
    with pytest.raises(ConfigError, match=r"train.milestones=\[7, 3\] do not increase"):
        rate_after(0.3, 0, [7, 3])


def test_what_is_frozen_is_left_out_and_what_is_shared_counts_once():
    layer = nn.Linear(2, 3)
    frozen = nn.Linear(2, 3).requires_grad_(False)
    (group,) = sgd([layer, frozen, layer], 0.01, momentum=0.9, weight_decay=5e-4).param_groups
    assert len(group["params"]) == 2 and group["weight_decay"] == 5e-4 and group["momentum"] == 0.9
