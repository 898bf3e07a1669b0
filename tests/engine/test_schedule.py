from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cegate.config import TrainConfig
from cegate.configfile import read_config
from cegate.engine.schedule import learning_rate, make_optimizer, parameter_groups


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


def test_steps_are_torchs_and_those_of_mfnets_fifty_epochs():
    config = TrainConfig(iterations=10, lr=0.3, schedule="steps", milestones=[3, 7], gamma=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)
    for iteration in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(config, iteration))
        optimizer.step(), schedule.step()
    mfnet = read_config("mfnet/vaihingen", [("data.roots.vaihingen_dsm", "/data")]).train
    rates = {learning_rate(mfnet, n): n for n in reversed(range(0, 50_000, 500))}
    assert {n: pytest.approx(rate) for rate, n in rates.items()} == {0: 1e-2, 24_000: 1e-3, 34_000: 1e-4, 44_000: 1e-5}


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_a_horizon_beyond_the_last_iteration_stops_the_fall_early(schedule):
    short = TrainConfig(iterations=30, lr=1.0, schedule=schedule, horizon=40)
    long = TrainConfig(iterations=40, lr=1.0, schedule=schedule)
    assert [learning_rate(short, n) for n in range(30)] == [learning_rate(long, n) for n in range(30)]


def test_sgd_lets_everything_decay_and_holds_shared_weights_once():
    layer = nn.Linear(2, 3)
    config = TrainConfig(optimizer="sgd", lr=0.01, momentum=0.8, weight_decay=5e-4)
    (group,) = make_optimizer(config, [layer, layer]).param_groups
    assert len(group["params"]) == 2
    assert (group["weight_decay"], group["momentum"], group["lr"]) == (5e-4, 0.8, 0.01)
