"""A list of tasks: one with a trained part, a view and draws of its own goes through training like those that ship."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import cegate
from cegate.checkpoint import load_state
from cegate.data.stream import Batch
from cegate.engine import stage
from cegate.engine.stage import Stage
from cegate.engine.trainer import train
from cegate.errors import CheckpointError
from cegate.tasks import build_tasks
from cegate.tasks.stream import StepStream
from cegate.tasks.task import Step, Task, Term, View, seeded

pytestmark = pytest.mark.usefixtures("no_figures")


@dataclass(frozen=True)
class Noise:
    """What the toy's data workers draw."""

    values: Tensor  # [B]

    def to(self, device, *, non_blocking=False):
        return Noise(self.values.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self


@dataclass(frozen=True)
class DrawNoise:
    seed: int

    def __call__(self, iteration: int, source: Batch) -> Noise:
        rng = np.random.default_rng([self.seed, 7, iteration])
        return Noise(torch.from_numpy(rng.normal(size=len(source)).astype(np.float32)))


class Restore(Task):
    """Restores features of the clean image from those of one with holes: a part, a view, draws, a state."""

    name = "restore"

    def __init__(self, seed: int, width: int, *, together: bool = True) -> None:
        self.seed, self.together, self.mean = seed, together, 0.0
        with seeded(seed, self.name):
            self.layer = nn.Conv2d(width, width, 1)

    def parts(self) -> dict[str, nn.Module]:
        return {"decoder": self.layer}

    def draws(self) -> DrawNoise:
        return DrawNoise(self.seed)

    def prepare(self, step: Step) -> None:
        image = step.views["image"].images
        holes = [step.rng("holes", slot).random(image.shape[-2:]) < 0.5 for slot in step.slots]
        masked = image * torch.from_numpy(np.stack(holes))[:, None] + step.drawn[self.name].values[:, None, None, None]
        step.views["masked"] = View(masked, beside="image" if self.together else None)

    def terms(self, step: Step) -> list[Term]:
        clean, masked = step.features["image"].maps[-1].detach(), step.features["masked"].maps[-1]
        losses = (self.layer(masked) - clean).abs().flatten(1).mean(1)
        self.mean = 0.9 * self.mean + 0.1 * losses.detach().mean().item()
        return [Term("restore", losses, list(step.batch.names), 0.3)]

    def journal(self) -> dict[str, float]:
        return {"restore": self.mean}

    def state(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state(self, state) -> None:
        self.mean = state["mean"]


@pytest.fixture
def with_toy(monkeypatch):
    """Runs train the toy beside what they train anyway."""

    def build(config, network, sets, *, adapting=True, share=range):
        tasks = build_tasks(config, network, sets, adapting=adapting, share=share)
        return [*tasks, Restore(config.run.seed, network.vit.embed_dim)] if adapting else tasks

    monkeypatch.setattr(stage, "build_tasks", build)


def assert_equal_runs(whole: Path, cut: Path) -> None:
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (load_state(folder / "checkpoints/last.pt") for folder in (whole, cut))
    for one, other in ((a.trained, b.trained), (a.task_weights, b.task_weights)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert a.tasks == b.tasks


def test_a_task_of_ones_own_is_trained_saved_and_resumed_bit_by_bit(small, with_toy, monkeypatch):
    changes = {"train__iterations": 4, "train__eval_every": 4, "train__checkpoint_every": 1}
    whole = train(small("whole", **changes)).path
    state = load_state(whole / "checkpoints/last.pt")
    assert set(state.task_weights) == {"restore.decoder.weight", "restore.decoder.bias"}
    start = Restore(0, len(state.task_weights["restore.decoder.bias"])).layer
    assert not torch.equal(state.task_weights["restore.decoder.weight"], start.weight)
    assert state.tasks["restore"]["mean"] > 0
    deployed = safetensors.torch.load_file(whole / "adapter/adapter_model.safetensors")
    assert not any("restore" in key for key in deployed)
    assert cegate.load(whole, "cpu").classes  # as if there had been no such task
    step = Stage.step

    def step_until(self, data):
        if (self.name, self.iteration) == ("after", 3):
            raise ZeroDivisionError("power cut")
        return step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(ZeroDivisionError):
            train(small("cut", **changes))
    assert_equal_runs(whole, train(small("cut", **changes, data__workers=2), resume=True).path)


def test_the_stage_of_the_frozen_backbone_knows_no_further_task(small, with_toy):
    changes = {"train__iterations": 2, "train__eval_every": 2, "data__validation": "null"}
    path = train(small(**changes, train__baseline=True)).path
    state = load_state(path / "checkpoints/before.pt")
    assert not state.task_weights and not state.tasks
    assert load_state(path / "checkpoints/best.pt").task_weights


def test_a_state_without_the_tasks_of_the_run_is_refused(small, with_toy, monkeypatch):
    config = small(train__iterations=2, data__validation="null")
    train(config)
    monkeypatch.setattr(stage, "build_tasks", build_tasks)
    with pytest.raises(CheckpointError, match=r"last\.pt holds the state of the tasks restore, this run has none"):
        train(config, resume=True)


def make_step(small, **views) -> Step:
    network = cegate.build(small(gate__method="all")).train()
    batch = Batch(torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32)), ["a", "b"])
    step = Step(3, batch, network, seed=0)
    step.views["image"] = View(batch.image, batch.label, names=("a", "b"))
    step.views |= views
    return step


def test_the_loss_of_a_view_is_the_networks(small):
    weights = torch.rand(2, 30, 27)
    odd = View(torch.randn(2, 3, 30, 27), torch.randint(0, 5, (2, 30, 27)), weights)  # not whole patches
    step = make_step(small, odd=odd)
    step.encode()
    for name, view in step.views.items():
        assert torch.equal(step.loss(name), step.network.loss(view.images, view.labels, weights=view.weights)), name


def test_views_beside_one_another_share_a_pass_and_others_do_not(small, monkeypatch):
    masked, apart = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 16, 16)
    step = make_step(small, masked=View(masked, beside="image"), apart=View(apart))
    encode, calls = step.network.encode, []

    def noted(images, **how):
        calls.append(tuple(images.shape))
        return encode(images, **how)

    monkeypatch.setattr(step.network, "encode", noted)
    step.encode()
    assert calls == [(4, 3, 32, 32), (1, 3, 16, 16)]
    for name in step.views:
        alone = encode(step.views[name].images)
        for together, expected in zip(step.features[name].maps, alone.maps, strict=True):
            torch.testing.assert_close(together, expected)


def test_a_purpose_draws_for_its_slot_whatever_others_draw(small):
    step = make_step(small)
    first = step.rng("holes", 1).random(4)
    torch.rand(3)
    step.rng("style").random(100)
    assert np.array_equal(step.rng("holes", 1).random(4), first)
    others = [step.rng("holes", 0), step.rng("holes"), step.rng("style", 1), replace(step, iteration=4).rng("holes", 1)]
    assert not any(np.array_equal(rng.random(4), first) for rng in others)


def test_initial_weights_depend_on_seed_and_purpose_alone():
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), Restore(0, 4).layer.weight
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Restore(0, 4).layer.weight, first) and not torch.equal(Restore(1, 4).layer.weight, first)


def test_parts_of_tasks_come_after_those_of_the_network_in_the_optimiser(small, with_toy, monkeypatch):
    kept = {}
    monkeypatch.setattr(Stage, "step", lambda self, data: kept.setdefault("stage", self) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(small(run__method="rein", refiner__tokens=4, refiner__rank=2))
    made = kept["stage"]
    order = {id(p): number for group in made.optimizer.param_groups for number, p in enumerate(group["params"])}
    learning = made.network.learning_modules()
    network = [order[id(p)] for part in learning.values() for p in part.parameters() if p.ndim > 1]
    assert order[id(made.task_parts["restore.decoder"].weight)] > max(network)
    assert list(learning) == ["toolbox", "head", "refiner"]


def test_draws_are_made_for_the_crops_they_belong_to():
    label = torch.tensor([[[0, 3], [3, 255]]])
    source = SimpleNamespace(batch=lambda iteration: Batch(torch.zeros(1, 3, 2, 2), label, [str(iteration)]))
    stream = StepStream(
        source, {"toy": lambda iteration, crops: Noise(torch.tensor([float(crops.names[0]) + iteration]))}
    )
    for data, iteration in zip(stream.loader(3, 6), range(3, 6), strict=True):
        assert data.drawn["toy"].values == 2 * iteration
        assert {value: count for value, count in enumerate(data.pixels.tolist()) if count} == {0: 1, 3: 2, 255: 1}
