"""SGD with a learning rate that drops at milestones, as MFNet is trained."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from cegate.errors import ConfigError


def rate_after(lr: float, iteration: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Learning rate of one iteration: ``lr`` times ``gamma`` for every milestone that is reached.

    Args:
        lr: of the first iterations.
        iteration: 0-based.
        milestones: iterations, increasing; at one the lower rate holds already.
        gamma: factor of a drop.

    Raises:
        ConfigError: milestones do not increase.
    """
    if list(milestones) != sorted(set(milestones)):
        raise ConfigError(f"train.milestones={list(milestones)} do not increase; give iterations in their order")
    return lr * gamma ** bisect_right(milestones, iteration)


def epochs_to_iterations(milestones: Sequence[int], batches: int) -> list[int]:
    """Milestones in epochs, as published code gives them, as iterations.

    That code steps its schedule before each epoch, counting from 1, so that a drop at epoch 25 comes after 24 of them.
    """
    return [(epoch - 1) * batches for epoch in milestones]


def sgd(modules: Iterable[nn.Module], lr: float, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """One group of whatever learns; all of it decays, norms and biases too, as published."""
    learning = {p: None for module in modules for p in module.parameters() if p.requires_grad}  # shared weights once
    return torch.optim.SGD(list(learning), lr=lr, momentum=momentum, weight_decay=weight_decay)
