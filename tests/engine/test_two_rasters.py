"""Two rasters from a configuration to a run: training, resume, what is shared, evaluation."""

from __future__ import annotations

import pytest
import torch

import cegate
from cegate.checkpoint import load_checkpoint, load_state
from cegate.config import Config
from cegate.configfile import read_config
from cegate.engine.evaluator import evaluate, evaluate_run
from cegate.engine.sets import open_sets
from cegate.engine.stage import Stage
from cegate.engine.trainer import train
from cegate.errors import ConfigError
from cegate.matrix.cells import _other_keys
from cegate.metrics import Confusion
from cegate.runfolder import RunFolder, read_json
from tests.conftest import SMALL

pytestmark = pytest.mark.usefixtures("no_figures")
METHODS = ("mfnet_lora", "mfnet_adapter", "mfnet_gate", "mfnet_lora_single", "mfnet_adapter_single")
CLASSES = SMALL["data"]["classes"]


@pytest.fixture
def two(tmp_path):
    """Configuration of a run of seconds on generated scenes with heights."""

    def make(method: str = "mfnet_lora", folder: str = "run", **changes: object) -> Config:
        scenes = {"kind": "generated", "split": "temperate", "tile": 24, "second": {"scale": "tile"}}
        mapping = SMALL | {
            "run": SMALL["run"] | {"method": method, "work_dir": str(tmp_path / folder)},
            "data": {"classes": CLASSES, "crop": 16, "batch_size": 2, "workers": 0}
            | {"source": scenes | {"limit": 2}, "validation": scenes | {"limit": 1, "first": 100, "tile": 16}},
            "model": {"weights": "none", "head": "unetformer"},
            "gate": {"k": 5, "interval": 1, "samples": 1},
            "train": {"iterations": 2, "lr": 1e-2, "eval_every": 2, "checkpoint_every": 1},
        }
        overrides = [(key.replace("__", "."), str(value)) for key, value in changes.items()]
        return read_config(mapping, overrides, training=True)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_shares_is_its_model(two, method, caplog):
    config = two(method, evaluate__mean_classes=CLASSES[1:], evaluate__stride=3)
    run = RunFolder(train(config).path)
    shared, saved = cegate.load(run.path), load_checkpoint(run, "best", read_config(run.config_file), "cpu")
    bands = 3 if "single" in method else 4
    images = torch.randn(2, bands, 24, 17)
    images[0, 3:, 5:9] = torch.nan
    assert torch.equal(shared(images), saved(images))
    assert shared.recipe == saved.recipe and shared.recipe.further == bands - 3
    metrics = read_json(run.eval / "source/metrics.json")
    known = [v["IoU"] for name, v in metrics["per_class"].items() if name != CLASSES[0] and v["IoU"] is not None]
    assert metrics["mIoU"] == pytest.approx(sum(known) / len(known)) and metrics["mean_classes"] == CLASSES[1:]
    assert "kappa" in metrics
    config = read_config(run.config_file)
    if bands == 3:
        with pytest.raises(ConfigError, match="learned from images alone and can do without nothing"):
            evaluate_run(run, config, without=["image"])
    if method == "mfnet_lora":
        measured = evaluate_run(run, config, without=["second"])
        assert [of.domain for of in measured] == ["source", "source_without_second"]
        assert "never learned to do without: second; it is measured all the same" in caplog.text
        with pytest.raises(ConfigError, match="there is no raster 'dsm' to do without; name image or second"):
            evaluate_run(run, config, without=["dsm"])
    if bands == 4:
        alone = [("data.targets.a", "{kind: generated, split: arid, limit: 1, tile: 16}")]
        with pytest.raises(ConfigError, match="set 'a' has no bands of a second raster, the model takes 1; give the"):
            evaluate_run(run, read_config(run.config_file, alone))
    if method == "mfnet_gate":
        scores = run.gates.records[0]["scores"]
        assert len(scores) == 48 and sum(name.endswith(".dsm") for name in scores) == 24
        assert sum(score for name, score in scores.items() if name.startswith("spatial")) == pytest.approx(1)


@pytest.mark.parametrize(("without", "hidden"), [("image", slice(0, 3)), ("second", slice(3, 4))])
def test_a_model_is_measured_without_a_raster(two, without, hidden):
    config, sets = open_sets(two("mfnet_lora", modal__dropout=0.5))
    model, item = cegate.build(config).eval(), sets.validation.read(0)
    with torch.no_grad():
        model.streams.absent.fill_(0.7)
        mean, std = (torch.tensor(values)[:, None, None] for values in model.recipe.statistics)
        pixels = (torch.from_numpy(item.image) - mean) / std
        pixels[hidden] = torch.nan
        expected = Confusion(model.classes)
        expected.update(model(pixels[None]).argmax(1)[0], torch.from_numpy(item.label).long())
    measured = evaluate(model, sets.validation, crop=16, without=without)
    assert measured.domain == f"source_without_{without}"
    assert torch.equal(measured.confusion.matrix, expected.matrix)


@pytest.mark.parametrize("method", ["mfnet_lora", "mfnet_gate"])
def test_a_run_that_loses_modalities_resumes_bit_by_bit(two, method, monkeypatch):
    whole = train(two(method, "whole", modal__dropout=0.5)).path
    config, step = two(method, "cut", modal__dropout=0.5), Stage.step

    def step_until(self, data):
        if self.iteration == 1:
            raise RuntimeError("power cut")
        return step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    cut = train(config, resume=True).path
    a, b = (load_state(path / "checkpoints/last.pt") for path in (whole, cut))
    assert all(torch.equal(a.trained[key], b.trained[key]) for key in a.trained)
    assert a.trained["streams.absent"].any(), "what stands for an unknown pixel learns"
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert cegate.load(cut).recipe.second.dispensable == ("image", "second")


def test_the_teacher_of_two_rasters_sees_both(two):
    scenes = "{kind: generated, split: arid, limit: 2, tile: 24, second: {}}"
    config = two(data__unlabelled=scenes, adapt__method="dacs", adapt__warmup=1, train__iterations=3)
    assert "mixed" in (train(config).path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source__second": "null"}, "run.method=mfnet_lora needs data.source.second"),
        (
            {"data__validation__second": "null"},
            "set 'source' gives 3 bands of its images, the source 3 bands of its images and 1 band of a second",
        ),
        ({"model__head": "linear"}, "model.head=linear takes four maps of one size, .* modal.fusion=sum"),
        ({"data__validation__second__missing": "allow"}, "data.validation.second.missing=allow needs a model that lea"),
        ({"run__method": "mfnet_gate", "injector__method": "gse"}, "leave out one of the two"),
        ({"run__method": "null", "mim__method": "restore"}, "data.source.second does not go with mim.method"),
        ({"run__method": "lora", "data__source__second": "null", "modal__dropout": 0.3}, "modal.dropout=0.3 needs"),
    ],
    ids=["no second", "none to test on", "no pyramid", "never learned to miss", "by method", "mim", "nothing to lose"],
)
def test_what_does_not_fit_is_said_in_a_line(two, changes, message):
    with pytest.raises(ConfigError, match=message):
        cegate.build(open_sets(two(**changes))[0])


def test_bands_that_the_files_decided_do_not_keep_a_matrix_from_going_on(two):
    config = two()
    saved, _ = open_sets(config)
    assert saved.data.source.second.bands == [1] and config.data.source.second.bands is None
    assert saved.data.source.second.surplus == "error" and cegate.build(saved).recipe.second.surplus == "error"
    assert not _other_keys(saved, config, moved=False)
    other = two(data__source__second__bands="[2]")
    assert _other_keys(saved, other, moved=False) == ["data.source.second.bands"]
