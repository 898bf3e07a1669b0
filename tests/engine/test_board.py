from __future__ import annotations

import json
import sys

import pytest

from cegate.engine.board import Board, scalars
from cegate.engine.trainer import train
from cegate.errors import ConfigError

EVALUATED = {
    "iteration": 4,
    "split": "after",
    "domain": "source",
    "loss": 0.5,
    "mIoU": None,
    "absent": ["road"],
    "per_class": {"water": {"IoU": 0.25, "F1": 0.4}, "road": {"IoU": None, "F1": None}},
}


def test_numbers_have_the_names_that_people_read():
    assert dict(scalars(EVALUATED)) == {"validation/loss": 0.5, "validation IoU/water": 0.25}
    line = {"iteration": 2, "split": "train", "stage": "before", "domain": "source", "loss": 1.0, "lr": 0.1}
    assert dict(scalars(line)) == {"train/loss": 1.0, "train/lr": 0.1}


def test_without_tensorboard_a_run_that_asks_for_it_says_so_and_writes_nothing(small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tensorboard, which is not installed; pip install 'cegate\[tensorboard\]'"):
        train(small(run__log="[jsonl, tensorboard]"))
    assert not (tmp_path / "run").exists()


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard_holds_the_scalars_of_the_journal_and_the_gate(small, no_figures):
    pytest.importorskip("tensorboard")
    run = train(small(run__log="[jsonl, tensorboard]", train__baseline=True)).path
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage, title in (("before", "frozen"), ("after", "gate")):
        board = read(run / "tensorboard" / title)
        of_stage = [line for line in journal if line.get("stage", line["split"]) == stage]
        expected = sorted((name, line["iteration"], value) for line in of_stage for name, value in scalars(line))
        found = sorted((tag, e.step, e.value) for tag in board.Tags()["scalars"] for e in board.Scalars(tag))
        assert [item[:2] for item in found] == [item[:2] for item in expected]
        assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], rel=1e-6)
    assert [image.step for image in board.Images("gate")] == [4, 7]


def test_what_a_resumed_run_writes_again_is_there_once(tmp_path):
    pytest.importorskip("tensorboard")
    for position, iterations in ((None, (2, 4, 6)), (("after", 4), (6, 8))):
        board = Board(tmp_path, None, position)
        board.write(*({"iteration": n, "split": "train", "stage": "after", "loss": float(n)} for n in iterations))
        board.close()
    assert [(e.step, e.value) for e in read(tmp_path / "gate").Scalars("train/loss")] == [(n, n) for n in (2, 4, 6, 8)]
