from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from cegate.tasks.stream import Probes


class Crops:
    """Batches that say which iteration they are of and which process read them."""

    def batch(self, iteration: int) -> torch.Tensor:
        return torch.tensor([iteration, os.getpid()])


def probes(workers: int, interval: int = 3, iterations: int = 10) -> Probes:
    config = SimpleNamespace(
        gate=SimpleNamespace(interval=interval),
        data=SimpleNamespace(workers=workers),
        train=SimpleNamespace(iterations=iterations),
    )
    return Probes(config, Crops())


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("rounds", [[0, 3, 6, 9], [6, 9], [0, 6, 3, 3], [9, 12]], ids=str)
def test_every_round_gets_its_own_batch(workers, rounds):
    """Resumed runs begin in the middle; whoever asks in another order gets what was asked for."""
    found = probes(workers)
    assert [int(found.batch(iteration)[0]) for iteration in rounds] == rounds


def test_another_process_reads_where_there_are_workers():
    assert int(probes(0).batch(0)[1]) == os.getpid()
    found = probes(2)
    readers = {int(found.batch(iteration)[1]) for iteration in (0, 3, 6)}
    assert len(readers) == 1
    assert os.getpid() not in readers
