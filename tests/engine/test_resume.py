from __future__ import annotations

import os
import signal
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cegate.checkpoint import load_state
from cegate.data import sets
from cegate.engine import evaluator
from cegate.engine.stage import Stage
from cegate.engine.trainer import _Loop, train
from cegate.errors import CheckpointError
from cegate.metrics import Confusion
from cegate.runfolder import folder_of, read_json

CHANGES = {"train__baseline": True, "gate__inactive": "frozen", "train__clip": 1.0}
pytestmark = pytest.mark.usefixtures("no_figures")


def run_until(monkeypatch, config, stage, iteration):
    """Train until the power fails in the middle of an iteration."""
    step = Stage.step

    def step_until(self, batch):
        if (self.name, self.iteration) == (stage, iteration):
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)


def assert_equal_runs(whole: Path, cut: Path, checkpoints):
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    for name in checkpoints:
        a, b = (load_state(folder / f"checkpoints/{name}.pt") for folder in (whole, cut))
        assert (a.active, a.frozen, a.position) == (b.active, b.frozen, b.position)
        assert a.trained.keys() == b.trained.keys()
        assert all(torch.equal(a.trained[key], b.trained[key]) for key in a.trained)
        for number, values in a.optimizer["state"].items():
            assert all(torch.equal(value, b.optimizer["state"][number][key]) for key, value in values.items())


@pytest.fixture
def whole(small, request):
    """One uninterrupted run for all tests of this file."""
    cache = request.config.stash.setdefault(WHOLE, {})
    if "path" not in cache:
        cache["path"] = train(small("whole", **CHANGES)).path
    return cache["path"]


WHOLE = pytest.StashKey[dict]()


@pytest.mark.parametrize(
    ("stage", "iteration", "every"),
    [("before", 0, 1), ("before", 2, 1), ("before", 5, 3), ("after", 0, 3), ("after", 3, 1), ("after", 6, 5)],
)
def test_a_stopped_run_resumes_bit_by_bit(whole, small, monkeypatch, stage, iteration, every):
    config = small("cut", **CHANGES, train__checkpoint_every=every)
    run_until(monkeypatch, config, stage, iteration)
    assert_equal_runs(whole, train(config, resume=True).path, ("last", "best", "before"))


@pytest.mark.usefixtures("little_mask2former")
def test_mask2former_with_its_random_points_resumes_bit_by_bit(small, monkeypatch):
    changes = {"model__head": "mask2former", "train__iterations": 2, "train__checkpoint_every": 1}
    changes |= {"data__validation": "null", "gate__samples": 1, "data__batch_size": 1, "train__log_every": 1}
    run_until(monkeypatch, small("cut", **changes), "after", 1)
    cut = train(small("cut", **changes), resume=True).path
    assert_equal_runs(train(small("whole", **changes)).path, cut, ("last",))


def test_what_was_measured_survives_a_resume(small, monkeypatch):
    config, step, seconds = small(train__baseline=True), Stage.step, {}

    def step_and_note(self, batch):
        key = self.name, self.iteration
        value = step(self, batch)
        seconds[key] = self.step_seconds[-1]  # of an iteration done twice, the one that counts
        return value

    monkeypatch.setattr(Stage, "step", step_and_note)
    run_until(monkeypatch, config, "after", 5)
    result = train(config, resume=True).path / "result.json"
    after = [value for (stage, _), value in seconds.items() if stage == "after"]
    found = read_json(result)
    assert len(after) == 7 and found["step_seconds"] == statistics.median(after)
    assert found["score_seconds"] > 0 and found["peak_memory_bytes"] > 0
    train(config, resume=True)
    assert read_json(result) == found


def test_a_run_that_ends_in_an_evaluation_makes_it_again(whole, small, monkeypatch):
    config, write = small("cut", **CHANGES, train__checkpoint_every=5), evaluator.write_evaluation

    def write_until(folder, evaluation, **more):
        if more["iteration"] == 4 and evaluation.domain == "arid":
            raise RuntimeError("power cut")
        write(folder, evaluation, **more)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "write_evaluation", write_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert load_state(folder_of(config) / "checkpoints/last.pt").iteration == 4
    assert "mIoU" not in (folder_of(config) / "metrics.jsonl").read_text().splitlines()[-1]
    assert_equal_runs(whole, train(config, resume=True).path, ("last", "best", "before"))


def test_what_counts_after_a_resume_is_of_one_model_even_if_numbers_come_out_otherwise(small, monkeypatch):
    """As on a GPU: the life that was cut found its best model where the next one does not."""
    config, scores, evaluate = (
        small(train__eval_every=2, train__checkpoint_every=3),
        Confusion.scores,
        _Loop._evaluate,
    )
    folder, values, current = folder_of(config), iter([0.3, 0.6, 0.2, 0.1]), {}

    def evaluate_as_told(self):
        current["mIoU"] = next(values)
        return evaluate(self)

    monkeypatch.setattr(_Loop, "_evaluate", evaluate_as_told)
    monkeypatch.setattr(Confusion, "scores", lambda self, *args, **how: replace(scores(self, *args, **how), **current))
    run_until(monkeypatch, config, "after", 5)
    assert [load_state(folder / f"checkpoints/{name}.pt").iteration for name in ("last", "best")] == [4, 4]
    result = read_json(train(config, resume=True).path / "result.json")
    assert result["iteration"] == load_state(folder / "checkpoints/best.pt").iteration == 4
    for domain, record in result["after"].items():
        written = read_json(folder / "eval" / domain / "metrics.json")
        assert (record["iteration"], record["mIoU"]) == (written["iteration"], written["mIoU"]) == (4, 0.6)
    assert next(values, None) is None  # nothing was evaluated twice


def test_resume_refuses_another_precision(small, monkeypatch):
    config = small()
    run_until(monkeypatch, config, "after", 5)
    monkeypatch.setattr("cegate.engine.trainer.precision_of", lambda name, device: ("bf16", nullcontext))
    with pytest.raises(CheckpointError, match=r"started with fp32 on cpu; here run.precision=auto is bf16"):
        train(config, resume=True)


def test_interrupt_saves_and_says_how_to_go_on(small, monkeypatch):
    step = Stage.step
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def step_and_interrupt(self, batch):
        if self.iteration == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Stage, "step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"after iteration 5 and saved.*--config \S+config.yaml --resume"):
        train(small())
    monkeypatch.setattr(Stage, "step", step)
    assert load_state(small().run.work_dir / Path("checkpoints/last.pt")).iteration == 5
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert train(small(), resume=True).after["arid"]["iteration"] in (4, 7)


def test_resume_refuses_another_configuration_and_other_data(small, monkeypatch):
    train(small())
    with pytest.raises(CheckpointError, match=r"other values of train\.lr; resume it with --config"):
        train(small(train__lr=0.5), resume=True)
    monkeypatch.setattr(sets.GeneratedSet, "fingerprint", lambda self, version=3: "other")
    with pytest.raises(CheckpointError, match="data of train, validation, arid is not what"):
        train(small(), resume=True)
