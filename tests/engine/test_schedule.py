from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cegate.config import TrainConfig
from cegate.engine.schedule import learning_rate, parameter_groups


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_warmup_rises_to_the_peak_and_the_rest_never_rises(schedule):
    config = TrainConfig(iterations=50, lr=2.0, warmup=10, schedule=schedule)
    rates = [learning_rate(config, iteration) for iteration in range(50)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert min(rates) > 0


def test_poly_is_torchs_polynomial():
    config = TrainConfig(iterations=40, lr=0.3, power=0.9)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=0.9)
    for iteration in range(40):
        assert learning_rate(config, iteration) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_cosine_is_half_way_in_the_middle():
    config = TrainConfig(iterations=100, lr=1.0, schedule="cosine")
    assert learning_rate(config, 50) == pytest.approx(0.5)


def test_norms_biases_embeddings_and_scalars_do_not_decay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.table = nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2)
            self.up_bias, self.scale = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.tensor(0.1))
            self.level_embed = nn.Parameter(torch.zeros(3, 2))

    net = Net()
    groups = parameter_groups([net], 0.05)
    decays = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert decays == {id(net.linear.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
