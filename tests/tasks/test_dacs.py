"""DACS: the teacher by itself, and training with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import cegate
from cegate.checkpoint import load_state, load_trained, trained_weights
from cegate.config import IGNORE, AugmentConfig, SetConfig
from cegate.data import sets
from cegate.data.datasets import open_set
from cegate.data.rasters import read_header
from cegate.data.stream import Batch
from cegate.engine.stage import Stage
from cegate.engine.trainer import describe, train
from cegate.fisher import SquaredGradients, measure_fisher
from cegate.gate import GatePlan
from cegate.runfolder import folder_of
from cegate.tasks.dacs import Dacs, Pasted, Pasting, Teacher, mix_domains, share_of_sure
from cegate.tasks.stream import StepStream, crops_of

pytestmark = pytest.mark.usefixtures("no_figures")

DACS = {
    "adapt__method": "dacs",
    "adapt__warmup": 3,
    "data__unlabelled": "{kind: generated, split: monsoon, limit: 3, tile: 48}",
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def strengthen(segmenter, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in trained_weights(segmenter).values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)


@pytest.fixture
def student(small):
    segmenter = cegate.build(small(gate__method="all", refiner__method="rein", refiner__tokens=4, refiner__rank=2))
    strengthen(segmenter)
    return segmenter.train()


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_running_mean_of_the_student(student):
    teacher, name = Teacher(student, ema=0.7), "head.classifier.bias"
    expected, own = None, trained_weights(student)
    for iteration in range(8):
        own[name].fill_(iteration + 1.0)
        teacher.follow(iteration)
        keep = min(1 - 1 / (iteration + 1), 0.7)
        expected = iteration + 1.0 if expected is None else keep * expected + (1 - keep) * (iteration + 1.0)
        torch.testing.assert_close(teacher.weights[name], torch.full_like(own[name], expected))


def test_after_the_first_step_the_teacher_is_the_student(student):
    teacher = Teacher(student, ema=0.99)
    strengthen(student, seed=2)
    teacher.follow(0)
    assert all(torch.equal(value, teacher.weights[name]) for name, value in trained_weights(student).items())


def test_the_teacher_sees_with_its_own_weights_through_the_students_backbone_and_gates(student, small):
    teacher = Teacher(student, ema=0.99)
    assert {name.partition(".")[0] for name in teacher.weights} == {"toolbox", "head", "refiner"}
    strengthen(student, seed=2)
    images, valid = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    twin = cegate.build(student.config).eval()
    load_trained(twin, teacher.weights, None, "the teacher")
    own = student(images)
    for plan in (GatePlan(student.toolbox.sites), GatePlan(["spatial.1", "frequency.3"]), GatePlan()):
        student.toolbox.apply(plan)
        twin.toolbox.apply(plan)
        with torch.no_grad():
            expected = twin(images).softmax(1).max(1)
        label, likely = teacher.label(images, valid)
        assert torch.equal(label, expected.indices)
        torch.testing.assert_close(likely, expected.values)
        assert not likely.requires_grad
    student.toolbox.apply(GatePlan(student.toolbox.sites))
    assert torch.equal(student(images), own)


def test_labelling_leaves_modes_random_state_and_gradients_as_found(student):
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    student.loss(images, labels).sum().backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    modes, state = [m.training for m in student.modules()], torch.get_rng_state()
    Teacher(student, ema=0.99).label(images, torch.ones(2, 32, 32, dtype=torch.bool))
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert grads.keys() == {name for name, p in student.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, grads[name]) for name, p in student.named_parameters() if name in grads)


def test_a_tuned_backbone_has_a_running_mean_too(small):
    student = cegate.build(small(run__method="full"))
    teacher = Teacher(student, ema=0.9)
    strengthen(student)
    teacher.follow(1)
    name, own = "vit.blocks.0.mlp.fc1.weight", trained_weights(student)
    fresh = trained_weights(cegate.build(student.config))
    torch.testing.assert_close(teacher.weights[name], (fresh[name] + own[name]) / 2)
    assert student.vit.blocks[0].mlp.fc1.weight.data_ptr() == own[name].data_ptr()


def test_what_is_not_valid_gets_no_label_and_does_not_count_as_sure(student):
    images, valid = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    valid[0, 10:] = False
    label, likely = Teacher(student, ema=0.99).label(images, valid)
    assert torch.equal(label == IGNORE, ~valid)
    assert share_of_sure(likely, valid, 0.0) == 1
    assert share_of_sure(likely, valid & False, 0.0) == 0
    threshold = likely[0, :10].median().item()
    assert share_of_sure(likely, valid, threshold) == (likely[valid] >= threshold).float().mean()


def test_chosen_pixels_come_from_the_source_and_the_rest_from_the_target():
    names = ["a", "b"]
    source = Batch(torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)), names)
    target = Batch(torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), IGNORE), names, torch.ones(2, 4, 4).bool())
    pasted, pseudo = torch.rand(2, 4, 4) < 0.5, torch.randint(3, 5, (2, 4, 4))
    image, label = mix_domains(source, Pasted(target, pasted), pseudo)
    for where, pixels, classes in ((pasted, source.image, source.label), (~pasted, target.image, pseudo)):
        assert torch.equal(label[where], classes[where])
        assert torch.equal(image.movedim(1, -1)[where], pixels.movedim(1, -1)[where])


# --- what the data workers draw -------------------------------------------------------------------------------------


@pytest.fixture
def crops(small):
    """Makes a stream of source crops, joined after two iterations by the target's."""
    config = small(**DACS)
    network = cegate.build(config)

    def make(seed: int = 0, source: SetConfig = config.data.source, **data: object) -> StepStream:
        run, data = replace(config.run, seed=seed), replace(config.data, **data)
        changed, size, classes = replace(config, run=run, data=data), data.batch_size, data.classes
        source = open_set(source, name="source", classes=classes)
        target = open_set(data.unlabelled, name="target", classes=classes, labelled=False)
        pasting = Pasting(crops_of(changed, network, target, size, "target"), warmup=2, seed=seed)
        return StepStream(crops_of(changed, network, source, size, "train"), {"dacs": pasting})

    return make


def flat(data) -> list[torch.Tensor]:
    drawn = data.drawn["dacs"]
    more = [] if drawn is None else [drawn.target.image, drawn.target.valid, drawn.pasted]
    return [data.source.image, data.source.label, *more]


def test_the_target_joins_after_the_warmup_and_the_source_does_not_notice(crops):
    stream = crops()
    early, late = stream.batch(1), stream.batch(2)
    assert early.drawn["dacs"] is None
    assert late.drawn["dacs"].target.image.shape == late.source.image.shape
    assert late.drawn["dacs"].pasted.shape == late.source.label.shape
    assert all(torch.equal(data.source.image, stream.source.batch(i).image) for i, data in ((1, early), (2, late)))
    names = {name for i in range(2, 5) for name in stream.batch(i).drawn["dacs"].target.names}
    assert names == {f"monsoon/{number:05d}" for number in range(3)}


def test_draws_are_a_function_of_seed_and_iteration_for_any_number_of_workers(crops):
    whole = [flat(crops().batch(iteration)) for iteration in range(1, 5)]
    for workers in (0, 2):
        for expected, got in zip(whole, crops().loader(1, 5, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, flat(got), strict=True))
    assert not torch.equal(flat(crops(seed=1).batch(3))[2], whole[2][2])


def test_the_slots_of_a_batch_paste_apart(crops):
    one = SetConfig(kind="generated", split="temperate", limit=1, tile=128)
    still = AugmentConfig(resize=[1.0, 1.0], flip=False, photometric=False)
    data = crops(source=one, crop=128, augment=still, batch_size=8).batch(2)
    assert (data.source.label == data.source.label[:1]).all()
    assert len({mask.numpy().tobytes() for mask in data.drawn["dacs"].pasted}) > 1


# --- training -------------------------------------------------------------------------------------------------------


def run_until(monkeypatch, config, iteration):
    """Train until the power fails in the middle of an iteration of the second stage."""
    step = Stage.step

    def step_until(self, batch):
        if (self.name, self.iteration) == ("after", iteration):
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)


def assert_equal_runs(whole: Path, cut: Path) -> None:
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (load_state(folder / "checkpoints/last.pt") for folder in (whole, cut))
    for one, other in ((a.trained, b.trained), (a.tasks["dacs"]["teacher"], b.tasks["dacs"]["teacher"])):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def whole(small, request):
    """One uninterrupted run for several tests of this file."""
    cache = request.config.stash.setdefault(WHOLE, {})
    if "path" not in cache:
        cache["path"] = train(small("whole", **DACS, train__baseline=True)).path
    return cache["path"]


WHOLE = pytest.StashKey[dict]()


def test_until_the_warmup_ends_the_target_changes_nothing(whole, small):
    plain = train(small("plain", train__baseline=True)).path
    records, without = lines(whole / "metrics.jsonl"), lines(plain / "metrics.jsonl")
    in_stage = [[r for r in run if r.get("stage", r["split"]) == "before"] for run in (records, without)]
    assert in_stage[0] == in_stage[1]
    first, second, *_ = [r for r in records if r.get("stage") == "after"]
    other_first, other_second, *_ = [r for r in without if r.get("stage") == "after"]
    assert first == other_first and "mixed" not in first
    assert second["mixed"] > 0 and second["loss"] != other_second["loss"]
    assert lines(whole / "gates.jsonl")[0] == lines(plain / "gates.jsonl")[0]
    environment = json.loads((whole / "env.json").read_text())
    assert environment["data"]["unlabelled"]["images"] == 3


@pytest.mark.parametrize(("iteration", "every"), [(2, 1), (4, 1), (6, 4)])
def test_a_stopped_run_resumes_bit_by_bit(whole, small, monkeypatch, iteration, every):
    config = small("cut", **DACS, train__baseline=True, train__checkpoint_every=every)
    run_until(monkeypatch, config, iteration)
    assert_equal_runs(whole, train(config, resume=True).path)


def test_a_checkpoint_of_an_older_version_is_gone_on_from_bit_by_bit(whole, small, monkeypatch):
    config = small("cut", **DACS, train__baseline=True, train__checkpoint_every=1)
    run_until(monkeypatch, config, 5)
    last = folder_of(config) / "checkpoints/last.pt"
    values = dict(vars(load_state(last)))
    for name in ("task_weights", "class_pixels", "elapsed_seconds", "config"):
        del values[name]
    torch.save(values | {"objective": values.pop("tasks")["dacs"], "format_version": 1}, last)
    assert_equal_runs(whole, train(config, resume=True).path)


@pytest.mark.parametrize(
    "changes",
    [{"run__method": "rein"}, {"run__method": "full"}, {"refiner__method": "rein"}, {"adapt__confidence": 0.2}],
    ids=["rein", "full", "gate and rein", "confidence"],
)
def test_every_kind_of_student_resumes_bit_by_bit(small, monkeypatch, changes):
    changes = {**DACS, "adapt__warmup": 1, "train__iterations": 4, "train__checkpoint_every": 1, **changes}
    run_until(monkeypatch, small("cut", **changes), 3)
    cut = train(small("cut", **changes), resume=True).path
    assert_equal_runs(train(small("whole", **changes)).path, cut)


def test_the_number_of_workers_does_not_matter(whole, small):
    assert_equal_runs(whole, train(small("b", **DACS, train__baseline=True, data__workers=2)).path)


def test_scoring_leaves_training_untouched(small):
    every_site = {**DACS, "adapt__warmup": 1, "gate__k": 24}
    often, seldom = (train(small(name, **every_site, gate__interval=n)).path for name, n in (("a", 1), ("b", 100)))
    assert (often / "metrics.jsonl").read_text() == (seldom / "metrics.jsonl").read_text()


def test_after_the_warmup_as_many_target_samples_are_scored(small, monkeypatch):
    probes = []

    def measure(model, toolbox, batches, **keys):
        probes.append(list(batches))
        return measure_fisher(model, toolbox, probes[-1], **keys)

    monkeypatch.setattr("cegate.engine.stage.measure_fisher", measure)
    both = train(small("a", **DACS)).path  # scores at 0, 3 and 6
    names = [[name.partition("/")[0] for batch in probe for name in batch.names] for probe in probes]
    assert names == [["temperate"] * 3, *2 * [["temperate"] * 3 + ["monsoon"] * 3]]
    target = torch.cat([batch.label for batch in probes[1]])[3:]
    assert set(target.unique().tolist()) <= {*range(5), IGNORE} and (target != IGNORE).any()
    probes.clear()
    source = train(small("b", **DACS, adapt__fisher_domains="source")).path
    assert [sum(len(batch) for batch in probe) for probe in probes] == [3, 3, 3]
    scored = [lines(path / "gates.jsonl")[1]["scores"] for path in (both, source)]
    assert scored[0] != scored[1]


def test_the_probe_is_labelled_with_the_students_gates(student, small):
    config = small(**DACS)
    target = open_set(config.data.unlabelled, name="set", classes=student.classes, labelled=False)
    task = Dacs(config, student, target)
    student.toolbox.apply(GatePlan(["semantic.2"]))
    expected = torch.cat([batch.label for batch in task.probe(4)])
    lazy = task.probe(4)
    student.toolbox.apply(GatePlan(student.toolbox.sites))
    everything_on = torch.cat([batch.label for batch in task.probe(4)])
    assert not torch.equal(everything_on, expected)
    with student.toolbox.tapped(SquaredGradients(diagonal=False, scale=1.0)):
        assert torch.equal(torch.cat([batch.label for batch in lazy]), expected)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_no_mask_of_the_target_is_ever_opened(small, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "far/images").mkdir(parents=True)
    (tmp_path / "far/masks").mkdir()
    for number in range(3):
        with rasterio.open(
            tmp_path / f"far/images/{number}.png", "w", driver="PNG", width=40, height=40, count=3, dtype="uint8"
        ) as file:
            file.write(rng.integers(0, 256, (3, 40, 40), dtype=np.uint8))
        (tmp_path / f"far/masks/{number}.png").write_text("no image at all")

    def refuse_masks(path: Path, *args: object, **keys: object):
        assert path.parent.name != "masks", f"{path} was opened"
        return read_header(path, *args, **keys)

    def refuse(*args: object, **keys: object) -> None:
        raise AssertionError(f"a mask was read: {args}")

    monkeypatch.setattr(sets, "read_header", refuse_masks)
    monkeypatch.setattr(sets, "read_mask", refuse)
    monkeypatch.setattr(sets.FileSet, "read_label", refuse)
    result = train(small(**{**DACS, "data__unlabelled": f"{{root: {tmp_path / 'far'}}}"}))
    assert "mixed" in lines(result.path / "metrics.jsonl")[-3]


def test_the_teacher_computes_in_the_precision_of_the_run(small, monkeypatch, no_figures):
    label, narrow = Teacher.label, []

    def label_and_note(self, images, valid):
        narrow.append(torch.is_autocast_enabled("cpu"))
        return label(self, images, valid)

    monkeypatch.setattr(Teacher, "label", label_and_note)
    train(small(**DACS, run__precision="bf16"))
    assert len(narrow) > 4 and all(narrow)  # in training and in the Fisher probe


def test_confidence_scales_the_mixed_loss(small):
    sure = train(small("a", **DACS, adapt__confidence=1e-9)).path
    plain = train(small("b", **DACS)).path
    never = train(small("c", **DACS, adapt__confidence=1.0)).path  # the pasted pixels of the source still count
    train_lines = [[r for r in lines(path / "metrics.jsonl") if r["split"] == "train"] for path in (sure, plain, never)]
    assert [{k: v for k, v in r.items() if k != "confident"} for r in train_lines[0]] == train_lines[1]
    assert train_lines[0][-1]["confident"] == 1.0
    assert train_lines[2][-1]["confident"] == 0.0
    assert 0 < train_lines[2][-1]["mixed"] < train_lines[1][-1]["mixed"]


def test_describe_names_adaptation_and_refiner(small):
    text = describe(small(**DACS, refiner__method="rein", refiner__tokens=4))
    assert "adapting to: 3 unlabelled images, dacs from iteration 3 on" in text
    assert "refiner: rein, 4 tokens of rank 16 a layer" in text
