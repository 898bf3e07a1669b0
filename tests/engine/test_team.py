"""Several processes, by gloo on this machine: what they agree on equals what one process would have."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import cegate
from cegate.data.datasets import open_set
from cegate.engine.evaluator import evaluate, join
from cegate.engine.team import Processes, Team, open_team
from cegate.engine.trainer import train
from cegate.errors import ConfigError
from cegate.tasks.stream import crops_of


def together(size: int, work: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """What ``work(team)`` gives in each of so many processes."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def run(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=size)
        try:
            answers.put((rank, work(Processes(torch.device("cpu")))))
        finally:
            dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        return [answer for _, answer in sorted(answers.get(timeout=60) for _ in processes)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def test_gradients_are_the_mean_and_what_has_none_anywhere_keeps_none(tmp_path):
    def work(team):
        with_all, of_one, of_none, still = (nn.Parameter(torch.zeros(2, 3)) for _ in range(4))
        double = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        with_all.grad = torch.full((2, 3), float(team.rank + 1))
        double.grad = torch.full((2,), 1e-12 * (team.rank + 1), dtype=torch.float64)
        if team.rank == 1:
            of_one.grad = torch.arange(6.0).view(2, 3)
        still.requires_grad_(False)
        team.average_gradients([with_all, double, of_one, of_none, still])
        return [None if p.grad is None else p.grad.tolist() for p in (with_all, double, of_one, of_none, still)]

    for answer in together(2, work, tmp_path):
        assert answer[0] == [[1.5] * 3] * 2 and answer[1] == pytest.approx([1.5e-12] * 2, rel=1e-15)
        assert answer[2] == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]] and answer[3:] == [None, None]


def test_sums_minima_and_objects(tmp_path):
    def work(team):
        column = torch.arange(6.0).view(2, 3).T  # not contiguous
        return (
            (team.rank, team.size, team.is_writer),
            team.sum(column * (team.rank + 1)).tolist(),
            team.mean(team.rank + 0.5),
            team.min(7 - team.rank),
            team.broadcast({"rank": team.rank}),
            team.gather(f"of {team.rank}"),
        )

    sums = (6 * torch.arange(6.0).view(2, 3).T).tolist()  # 1 + 2 + 3 times
    for rank, answer in enumerate(together(3, work, tmp_path)):
        assert answer == ((rank, 3, rank == 0), sums, 1.5, 5, {"rank": 0}, ["of 0", "of 1", "of 2"])


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_are_all_there_is_in_order(count):
    shares = []
    for rank in range(3):
        team = Team()
        team.rank, team.size = rank, 3
        shares.append(team.share(count))
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Team().share(count) == range(count)


def test_crops_of_the_shares_are_those_of_the_batch(small):
    config = small()
    network, source = cegate.build(config), open_set(config.data.source, name="source", classes=config.data.classes)
    whole = crops_of(config, network, source, 4, "train").batch(3)
    parts = [
        crops_of(config, network, source, 4, "train", lambda n, s=s: range(n)[s]).batch(3)
        for s in (slice(3), slice(3, 4))
    ]
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
    assert [name for part in parts for name in part.names] == whole.names


def test_an_evaluation_in_parts_is_that_of_the_whole(small):
    config = small(data__targets="{arid: {kind: generated, split: arid, limit: 3, tile: 40}}")
    network, target = cegate.build(config), config.data.targets["arid"]
    dataset = open_set(target, name="arid", classes=config.data.classes)
    whole = evaluate(network, dataset, crop=32)
    parts = [evaluate(network, dataset, crop=32, part=part) for part in (range(0), range(2), range(2, 3))]
    joined = join(parts)
    assert torch.equal(joined.confusion.matrix, whole.confusion.matrix) and joined.images == 3
    assert joined.tiles.names == whole.tiles.names
    assert np.array_equal(joined.tiles.confusion, whole.tiles.confusion)
    assert joined.loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_batch_of_unequal_shares_is_refused():
    team = Team()
    team.size = 3
    team.check(6)
    with pytest.raises(ConfigError, match=r"data\.batch_size=4 is no multiple of the 3 processes; use 3 or 6"):
        team.check(4)


def test_one_of_several_processes_is_refused_before_anything_is_written(small, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: training runs in one process"):
        train(small())
    assert not (tmp_path / "run").exists()
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert open_team().size == 1
