"""The processes of a run. Training knows others through a team only; a team of one does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cegate.errors import ConfigError

T = TypeVar("T")


class Team:
    """One process, which is all there is; and what several would have to agree on."""

    rank = 0
    size = 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Those of ``count`` things in a row that this process takes; shares differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def check(self, batch_size: int) -> None:
        """Refuse a batch of unequal shares: the mean over the team would not be the mean over the batch.

        Raises:
            ConfigError: with the batch sizes that would do.
        """
        if batch_size % self.size:
            low = batch_size // self.size * self.size
            fit = f"{low} or {low + self.size}" if low else f"{self.size}"
            raise ConfigError(f"data.batch_size={batch_size} is no multiple of the {self.size} processes; use {fit}")

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the team; may change ``value``."""
        return value

    def mean(self, value: float) -> float:
        """Mean over the team."""
        return value

    def min(self, value: int) -> int:
        """Smallest of the team."""
        return value

    def broadcast(self, value: T) -> T:
        """What the writer has; any object that can be pickled."""
        return value

    def gather(self, value: T) -> list[T]:
        """What each has, in order of rank; any object that can be pickled."""
        return [value]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the mean of the gradients, between backward and clipping.

        Args:
            parameters: equal ones in an equal order in every process, learning ones and others.
        """


class Processes(Team):
    """The processes of an initialised ``torch.distributed`` group.

    Args:
        device: where tensors of the group's backend must lie: the CPU for gloo, this process's GPU for NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def sum(self, value: Tensor) -> Tensor:
        value = value.contiguous()  # NCCL wants it so
        dist.all_reduce(value)
        return value

    def mean(self, value: float) -> float:
        return self.sum(torch.tensor(value, dtype=torch.float64, device=self.device)).item() / self.size

    def min(self, value: int) -> int:
        smallest = torch.tensor(value, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One flat sum for each dtype. A weight without a gradient everywhere goes on without one, so that no optimiser
        touches it; a flag for each weight, summed along, says so."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        for dtype in dict.fromkeys(parameter.dtype for parameter in learning):
            alike = [parameter for parameter in learning if parameter.dtype == dtype]
            self._average(alike)

    def _average(self, alike: Sequence[nn.Parameter]) -> None:
        has = alike[0].new_tensor([float(parameter.grad is not None) for parameter in alike])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = self.sum(torch.cat([*(grad.flatten() for grad in grads), has]))
        *means, anywhere = flat.split([*(p.numel() for p in alike), len(alike)])
        for parameter, mean, somewhere in zip(alike, means, anywhere.tolist(), strict=True):
            if somewhere:
                parameter.grad = mean.div(self.size).view_as(parameter)


def open_team() -> Team:
    """The team of this process.

    Raises:
        ConfigError: started as one of several, which training does not serve yet.
    """
    world = os.environ.get("WORLD_SIZE", "").strip()
    if world not in ("", "0", "1"):
        raise ConfigError(
            f"WORLD_SIZE={world}: training runs in one process; start it by `cegate train`, without torchrun or srun "
            "of several tasks (or unset WORLD_SIZE)"
        )
    return Team()
