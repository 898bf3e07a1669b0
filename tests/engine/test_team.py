"""Several processes, by gloo on this machine: what they agree on equals what one process would have."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cegate
from cegate import bench, predict
from cegate.checkpoint import load_state
from cegate.data.datasets import open_set
from cegate.engine.evaluator import evaluate, join
from cegate.engine.stage import Stage
from cegate.engine.team import Processes, Team, open_team
from cegate.engine.trainer import train
from cegate.errors import ConfigError, TrainingError
from cegate.network import Network
from cegate.tasks.stream import crops_of


@pytest.fixture
def together(in_a_group):
    """Gives what ``work(team)`` gives in each of so many processes."""
    return lambda size, work: in_a_group(size, lambda rank: work(Processes(torch.device("cpu"))))


@pytest.fixture
def trained_together(forked):
    """Gives what each of so many processes, started as torchrun does, gives or ends with; they share one machine."""

    def call(size: int, work: Callable[[], Any]) -> list[Any]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def run(rank: int) -> Any:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="localhost")
            return work()

        return forked(size, run)

    return call


def test_gradients_are_the_mean_and_what_has_none_anywhere_keeps_none(together):
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

    for answer in together(2, work):
        assert answer[0] == [[1.5] * 3] * 2 and answer[1] == pytest.approx([1.5e-12] * 2, rel=1e-15)
        assert answer[2] == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]] and answer[3:] == [None, None]


def test_sums_minima_and_objects(together):
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
    for rank, answer in enumerate(together(3, work)):
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


def journal(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_two_processes_train_as_one_does(trained_together, small, no_figures, tmp_path):
    changes = {"data__targets": "{arid: {kind: generated, split: arid, limit: 3, tile: 40}}", "train__clip": 1.0}
    alone = train(small("alone", **changes))
    first, second = trained_together(2, lambda: train(small("both", **changes)))
    assert second is None and first.path == tmp_path / "both" and not os.environ.get("RANK")
    gates, losses = ([journal(run.path, name) for run in (alone, first)] for name in ("gates.jsonl", "metrics.jsonl"))
    assert [line["active"] for line in gates[0]] == [line["active"] for line in gates[1]]
    assert gates[0][2]["scores"] == pytest.approx(gates[1][2]["scores"], rel=1e-3)
    assert len(losses[0]) == len(losses[1]) == 8
    for one, two in zip(*losses, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    trained = [load_state(run.path / "checkpoints/last.pt") for run in (alone, first)]
    for key, value in trained[0].trained.items():
        torch.testing.assert_close(trained[1].trained[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert trained[0].class_pixels == trained[1].class_pixels and sum(trained[0].class_pixels) == 7 * 2 * 32 * 32
    names, counts = zip(*(np.load(run.path / "eval/arid/tiles.npz").values() for run in (alone, first)), strict=True)
    assert names[0].tolist() == names[1].tolist() and counts[0].sum() == counts[1].sum() == 3 * 40 * 40
    log = (first.path / "train.log").read_text()
    weights = sum(p.numel() for p in cegate.build(small()).head.parameters())
    per_step = [float(found) for found in re.findall(r"a step sums ([0-9.]+) MB of gradients over 2 processes", log)]
    assert per_step and all(4e-6 * weights < found < 0.5 for found in per_step)


def test_a_process_that_dies_ends_the_others_and_each_says_why(trained_together, small, no_figures, monkeypatch):
    step = Stage.step

    def step_or_die(self, data):
        if self.team.rank == 1 and self.iteration == 2:
            raise TrainingError("the disk of process 1 is on fire")
        return step(self, data)

    monkeypatch.setattr(Stage, "step", step_or_die)
    other, dead = trained_together(2, lambda: train(small()))
    assert str(dead) == "the disk of process 1 is on fire"
    assert isinstance(other, TrainingError) and "process 0 of 2 ends because another one has" in str(other)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_its_name(
    trained_together, small, no_figures, monkeypatch, tmp_path
):
    loss = Network.loss_of

    def bad_in_the_second(self, *args):
        nan = os.environ["RANK"] == "1" and torch.is_grad_enabled() and self.training
        return loss(self, *args) * (float("nan") if nan else 1.0)

    monkeypatch.setattr(Network, "loss_of", bad_in_the_second)
    errors = trained_together(2, lambda: train(small()))
    assert all(isinstance(error, TrainingError) for error in errors)
    saved = json.loads((tmp_path / "run" / "nan_batch.json").read_text())
    assert len(saved["names"]) == 2 and saved["not_finite"] == saved["names"][1:]
    assert saved["not_finite"][0] in str(errors[0]) and saved["not_finite"][0] in str(errors[1])


def test_an_interrupt_of_one_process_is_granted_by_all_and_the_run_goes_on(
    trained_together, small, no_figures, monkeypatch
):
    step = Stage.step

    def step_and_signal(self, data):
        if self.team.rank == 1 and self.iteration == 3 and "GO_ON" not in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, data)

    monkeypatch.setattr(Stage, "step", step_and_signal)
    both = trained_together(2, lambda: train(small()))
    assert all(isinstance(error, KeyboardInterrupt) and "after iteration 4" in str(error) for error in both)
    monkeypatch.setenv("GO_ON", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    first, _ = trained_together(2, lambda: train(small()))  # as torchrun starts them again
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    whole, _ = trained_together(2, lambda: train(small("whole")))
    assert [(first.path / name).read_text() for name in ("metrics.jsonl", "gates.jsonl")] == [
        (whole.path / name).read_text() for name in ("metrics.jsonl", "gates.jsonl")
    ]


def test_what_differs_between_processes_is_refused(together):
    def work(team):
        team.agree("same", "the plan")
        try:
            team.agree(team.rank == 1, "the plan")
        except TrainingError as error:
            return str(error)

    for answer in together(3, work):
        assert answer.startswith("the plan of process 1 is not that of process 0; give all the same data")


def test_the_error_of_the_writer_is_that_of_all(together):
    def work(team):
        assert team.of_writer(lambda: team.rank) == 0
        try:
            team.of_writer(lambda: {}["no"] if team.rank else refuse())
        except ConfigError as error:
            return str(error)

    def refuse():
        raise ConfigError("taken")

    assert together(2, work) == ["taken"] * 2


def test_several_processes_are_started_by_torchrun_alone(small, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 without RANK, .* started by torchrun --nproc-per-node N"):
        train(small())
    assert not (tmp_path / "run").exists()
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        with open_team("cpu") as (team, device):
            assert team.size == 1 and device.type == "cpu"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model__head": "unetformer", "data__crop": 32}, "norms over a batch"),
        (
            {
                "adapt__method": "dacs",
                "adapt__confidence": 0.5,
                "adapt__warmup": 2,
                "data__unlabelled": "{kind: generated, split: monsoon, limit: 3, tile: 48}",
            },
            "adapt.confidence=0.5 weighs by a share of the batch's pixels",
        ),
    ],
)
def test_means_over_a_batch_are_refused_in_several_processes(trained_together, small, tmp_path, keys, why):
    config = small(**keys)
    for error in trained_together(2, lambda: train(config)):
        assert isinstance(error, ConfigError) and why in str(error)
    assert not (tmp_path / "run").exists()


def test_a_plan_is_shared_and_an_error_waits_for_the_others(together, tmp_path):
    def work(team: Processes) -> tuple[list[str], str, float]:
        mine, error = team.mine({name: name.upper() for name in "abcde"}), ""
        try:
            with team.together():
                if team.rank == 0:
                    raise TrainingError("a is damaged")
                time.sleep(0.5)
                (tmp_path / "written").touch()
        except TrainingError as problem:
            error = str(problem)
        return sorted(mine.values()), error, (tmp_path / "written").exists()

    assert together(2, work) == [(["A", "B"], "a is damaged", True), (["C", "D", "E"], "", True)]


def test_processes_of_torchrun_share_the_images_to_predict(trained_together, small, no_figures, tmp_path, capfd):
    run = train(small(train__iterations=1, gate__samples=1)).path
    (tmp_path / "in").mkdir()
    for number in range(3):
        pixels = np.full((40, 40, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{number}.png")
    (tmp_path / "in/0.png").write_bytes(b"damaged")
    command = ["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    codes = trained_together(2, lambda: predict.main(command))
    assert codes == [1, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2.png"]
    assert "0.png" in capfd.readouterr().err


def test_bench_is_not_started_by_torchrun(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.main(["--output", str(tmp_path)]) == 2
    assert "start it once on each with the same --output" in " ".join(capsys.readouterr().err.split())
