"""The processes of a run. Training knows others through a team only; a team of one does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cegate.compute import pick_device
from cegate.errors import CegateError, ConfigError, TrainingError

K, T = TypeVar("K"), TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""For another process that is alive and late, as where one has larger images to evaluate; a dead one is noticed at
once."""
STARTED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process of its team."""


class Team:
    """One process, which is all there is; and what several would have to agree on."""

    rank = 0
    size = 1
    bytes_of_step = 0
    """Bytes of gradients that the last step summed, for each process."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Those of ``count`` things in a row that this process takes; shares differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def mine(self, plan: dict[K, T]) -> dict[K, T]:
        """Those of a plan that this process takes, once every process has made the same plan: nobody begins before."""
        self.agree(len(plan), "the plan")
        keys = list(plan)
        return {keys[place]: plan[keys[place]] for place in self.share(len(keys))}

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside is raised once all are through, for the first process that ends with one ends the others."""
        try:
            yield
        finally:
            self.gather(None)

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

    def any(self, value: bool) -> bool:
        """Whether it is so somewhere."""
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

    def of_writer(self, work: Callable[[], T]) -> T:
        """What the writer's work gives, or the error it ends with; the others wait for it and do none."""
        return work()

    def agree(self, value: Any, what: str) -> None:
        """See that all have the same.

        Raises:
            TrainingError: they have not; names the processes.
        """
        values = self.gather(value)
        if other := [str(rank) for rank, theirs in enumerate(values) if theirs != values[0]]:
            raise TrainingError(
                f"{what} of process {', '.join(other)} is not that of process 0; give all the same data, weights, "
                "versions and kind of device"
            )

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

    def any(self, value: bool) -> bool:
        return self.sum(torch.tensor(int(value), device=self.device)).item() > 0

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

    def of_writer(self, work: Callable[[], T]) -> T:
        value, error = None, None
        if self.is_writer:
            try:
                value = work()
            except CegateError as problem:
                error = problem
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One flat sum for each dtype. A weight without a gradient everywhere goes on without one, so that no optimiser
        touches it; a flag for each weight, summed along, says so."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        self.bytes_of_step = sum(parameter.nbytes for parameter in learning)
        for dtype in dict.fromkeys(parameter.dtype for parameter in learning):
            alike = [parameter for parameter in learning if parameter.dtype == dtype]
            self._average(alike)

    def _average(self, alike: Sequence[nn.Parameter]) -> None:
        has = alike[0].new_tensor([float(parameter.grad is not None) for parameter in alike])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = self.sum(torch.cat([*(grad.flatten() for grad in grads), has]))
        *means, anywhere = flat.split([*(p.numel() for p in alike), len(alike)])
        for parameter, mean, somewhere in zip(alike, means, anywhere.tolist(), strict=True):
            if not somewhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            torch.div(mean.view_as(parameter), self.size, out=parameter.grad)  # in place: a recorded step writes there


@contextmanager
def open_team(device: str = "auto", patience: timedelta = PATIENCE) -> Iterator[tuple[Team, torch.device]]:
    """The team that this process was started in, by torchrun or alone, and the device it computes on.

    Args:
        device: ``run.device``. In a team every process takes the GPU of its number on this machine; gloo joins CPUs,
            NCCL GPUs.
        patience: with another process that is alive and late.

    Raises:
        ConfigError: started as one of several otherwise, or with a GPU named for all of them.
        TrainingError: inside, another process of the team has ended.
    """
    world = os.environ.get("WORLD_SIZE", "").strip()
    if world in ("", "0", "1"):
        yield Team(), pick_device(device)
        return
    if missing := [name for name in STARTED_BY if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={world} without {', '.join(missing)}: several processes are started by torchrun "
            "--nproc-per-node N -m cegate.train; for one, unset WORLD_SIZE"
        )
    place = _device_of_team(device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(place), place
    except RuntimeError as error:
        if not _is_loss_of_another(error):
            raise
        raise TrainingError(
            f"process {os.environ['RANK']} of {world} ends because another one has: its own error is above or below"
        ) from error
    finally:
        dist.destroy_process_group()


def _device_of_team(device: str, local_rank: int) -> torch.device:
    if ":" in device:
        raise ConfigError(f"run.device={device} names one GPU for several processes; give cuda, and each takes its own")
    chosen = pick_device(device)
    return pick_device(f"cuda:{local_rank}") if chosen.type == "cuda" else chosen


def _is_loss_of_another(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "by peer" in str(error)
