from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cegate
from cegate.checkpoint import load_state, trained_weights
from cegate.engine.results import Result
from cegate.engine.stage import Stage
from cegate.engine.trainer import describe, train
from cegate.errors import CheckpointError, ConfigError, DataError, TrainingError
from cegate.methods import METHODS
from cegate.runfolder import folder_of
from cegate.tasks.task import Step

PROMISED = (
    *("config.yaml", "env.json", "train.log", "metrics.jsonl", "gates.jsonl"),
    *("checkpoints/last.pt", "checkpoints/best.pt", "checkpoints/before.pt"),
    *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md"),
    *("figures/gate.png", "figures/curves.png", "figures/panels_source.png", "figures/panels_arid.png"),
    *("eval/arid/metrics.json", "eval/arid/confusion.npy", "eval/arid/per_class.csv", "eval/arid/tiles.npz"),
    "result.json",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_the_interface_promises(small):
    config = small(train__baseline=True)
    result = train(config)
    run = result.path
    for name in PROMISED:
        assert (run / name).stat().st_size > 0, name
    assert [path.name for path in (run / "checkpoints").glob("iter_*.pt")] == ["iter_7.pt"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["iterations"] == 7
    environment = json.loads((run / "env.json").read_text())
    assert environment["seed"] == 0 and environment["data"]["arid"]["images"] == 1
    assert [line["iteration"] for line in lines(run / "gates.jsonl")] == [0, 3, 6]
    assert all(len(line["active"]) == 5 and len(line["scores"]) == 24 for line in lines(run / "gates.jsonl"))
    evaluated = [
        (r["split"], r["iteration"], r["domain"]) for r in lines(run / "metrics.jsonl") if r["split"] != "train"
    ]
    steps = [(4, "source"), (4, "arid"), (7, "source"), (7, "arid")]
    assert evaluated == [(split, *step) for split in ("before", "after") for step in steps]
    table = result.table()
    assert all(word in table for word in ("frozen", "gate", "change", "validation", "arid", "water", "mean"))


def test_the_table_shows_the_numbers_of_the_saved_evaluation(small, no_figures):
    result = train(small())
    saved = json.loads((result.path / "eval/arid/metrics.json").read_text())
    confusion = np.load(result.path / "eval/arid/confusion.npy")
    assert saved["mIoU"] == result.after["arid"]["mIoU"]
    assert confusion.dtype == np.int64 and confusion.sum() == 40 * 40
    assert f"{100 * saved['mIoU']:.1f}" in result.table()


def test_training_lowers_the_loss_and_moves_only_trained_weights(small, no_figures):
    config = small(train__iterations=30, train__log_every=5, train__eval_every=30, data__validation="null")
    result = train(config)
    losses = [r["loss"] for r in lines(result.path / "metrics.jsonl") if r["split"] == "train"]
    assert losses[-1] < losses[0]
    state = load_state(result.path / "checkpoints/last.pt")
    fresh = cegate.build(config)
    own = {f"toolbox.{name}": value for name, value in fresh.toolbox.state_dict().items()}
    never = [key for key in own if ".".join(key.split(".")[1:3]) not in state.ever_active]
    assert never and all(torch.equal(own[key], state.trained[key]) for key in never)
    assert any(not torch.equal(own[key], state.trained[key]) for key in own.keys() - set(never))


def test_a_change_too_small_to_show_has_no_sign_of_a_loss(tmp_path):
    before, after = (
        {"source": {"mIoU": iou, "per_class": {"road": {"IoU": iou}}, "absent": []}} for iou in (0.5, 0.49999)
    )
    shown = Result(tmp_path, before, after).table()
    assert "+0.0" in shown and "-0.0" not in shown


def test_workers_and_scoring_do_not_change_the_stream(small, no_figures):
    often, seldom = (train(small(name, gate__interval=n, gate__method="fisher")) for name, n in (("a", 1), ("b", 100)))
    workers = train(small("c", gate__interval=1, data__workers=2))
    assert (often.path / "metrics.jsonl").read_text() == (workers.path / "metrics.jsonl").read_text()
    first = [lines(result.path / "gates.jsonl")[0] for result in (often, seldom)]
    assert first[0] == first[1]


def test_nan_loss_stops_with_the_file_names_saved(small, no_figures, monkeypatch):
    loss = Step.loss

    def half_nan(self, view):
        return loss(self, view) * torch.tensor([1.0, float("nan")])

    monkeypatch.setattr(Step, "loss", half_nan)
    config = small()
    with pytest.raises(TrainingError, match=r"iteration 0 is not finite for temperate/\d+ .*nan_batch.json"):
        train(config)
    saved = json.loads((Path(config.run.work_dir) / "nan_batch.json").read_text())
    assert len(saved["names"]) == 2 and saved["not_finite"] == saved["names"][1:] and saved["loss"][1] is None


def test_a_taken_folder_is_refused_moved_aside_or_resumed(small, no_figures, tmp_path):
    train(small())
    with pytest.raises(CheckpointError, match=r"--resume goes on with it, --overwrite moves it aside"):
        train(small())
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    train(small(), overwrite=True)
    assert (tmp_path / "run.old-1" / "mine.txt").read_text() == "keep me"
    assert not (tmp_path / "run" / "mine.txt").exists()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(small(), resume=True)  # a finished run only writes its figures again
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_folder_that_is_no_run_is_never_touched(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"no cegate run; give another run\.work_dir"):
            train(small(), overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.doc").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"no run in .* to resume"):
        train(small("absent"), resume=True)


def test_problems_show_before_the_run_folder_is_made(small, tmp_path):
    with pytest.raises(ConfigError, match=r"gate\.k=25 .* 24 sites"):
        train(small(gate__k=25))
    with pytest.raises(DataError):
        train(small(data__targets=f"{{far: {{kind: folder, root: {tmp_path / 'nowhere'}}}}}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["all", "none", "fixed"])
def test_other_gates_train_what_they_say(small, no_figures, method):
    config = small(gate__method=method, gate__sites="[spatial.7, frequency.0]" if method == "fixed" else "[]")
    path = train(config).path
    (gate,) = lines(path / "gates.jsonl")
    expected = {"all": 24, "none": 0, "fixed": 2}[method]
    assert gate["iteration"] == 0 and len(gate["active"]) == expected
    assert len(json.loads((path / "adapter/adapter_config.json").read_text())["active_sites"]) == expected


def test_without_validation_the_last_model_counts(small, no_figures):
    result = train(small(data__validation="null"))
    assert result.after["arid"]["iteration"] == 7
    assert "there is no validation set" in result.table()


def test_bf16_trains(small, no_figures):
    result = train(small(run__precision="bf16"))
    assert json.loads((result.path / "env.json").read_text())["precision"] == "bf16"


def test_describe_says_that_a_device_is_not_here(small):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    lines = describe(small(run__device="cuda")).splitlines()
    assert lines[-1].startswith("not on this machine: device 'cuda' is not there; this machine has 0 GPUs")


def test_describe_says_what_a_run_would_do_and_writes_nothing(small, tmp_path):
    text = describe(small())
    assert all(word in text for word in ("4 images", "arid", "24 sites", "5 best", "7 iterations", str(tmp_path)))
    assert not (tmp_path / "run").exists()


# those of two rasters: below
@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("mfnet")])
def test_every_method_trains_what_its_name_says(small, no_figures, method):
    result = train(small(run__method=method, style__block=8, mim__block=8))
    written = json.loads((result.path / "result.json").read_text())
    assert written["after"]["arid"]["mIoU"] == result.after["arid"]["mIoU"]
    state = load_state(result.path / "checkpoints/best.pt")
    sizes = {name: value.numel() for name, value in state.trained.items()}
    on = sum(size for name, size in sizes.items() if ".".join(name.split(".")[1:3]) in state.active)
    beside = sum(size for name, size in sizes.items() if not name.startswith(("toolbox.", "head.")))
    assert written["trained_parameters"] == on + beside
    assert (written["trained_parameters"] == 0) == (method == "frozen")
    assert written["step_seconds"] > 0 and written["peak_memory_bytes"] > 0
    assert {site.partition(".")[0] for site in state.active} <= set(cegate.load(result.path).config.toolbox.kinds)


@pytest.mark.parametrize("method", ["mfnet_adapter", "mfnet_lora_single", "mfnet_gate"])
def test_the_adapter_of_a_model_of_two_rasters_is_loaded_whole(small, no_figures, method):
    second = {f"data__{name}__second": "{}" for name in ("source", "targets__arid")}
    short = {"data__validation": "null", "train__iterations": 1, "model__head": "unetformer", "run__method": method}
    path = train(small(**second, **short)).path
    loaded = trained_weights(cegate.load(path, "cpu"))
    state = load_state(path / "checkpoints/best.pt")
    off = {key for key in state.trained if key.startswith("toolbox.") and not any(s in key for s in state.active)}
    assert loaded.keys() == state.trained.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.trained.items() if key not in off)


def test_full_tuning_moves_the_backbone_and_the_adapter_brings_it_back(small, no_figures):
    config = small(run__method="full", train__baseline=True)
    result = train(config)
    tuned, before = (load_state(result.path / f"checkpoints/{name}.pt").trained for name in ("best", "before"))
    assert not torch.equal(tuned["vit.blocks.0.mlp.fc1.weight"], before["vit.blocks.0.mlp.fc1.weight"])
    segmenter = cegate.load(result.path, device="cpu")
    assert torch.equal(segmenter.vit.blocks[0].mlp.fc1.weight, tuned["vit.blocks.0.mlp.fc1.weight"])


def test_random_gates_are_drawn_anew_each_round_and_the_same_for_a_seed(small, no_figures):
    runs = [train(small(name, run__method="random", run__seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ([line["active"] for line in lines(run.path / "gates.jsonl")] for run in runs)
    assert len(first) == 3 and first[0] != first[1]
    assert first == again != other
    assert all(len(active) == 5 for active in first)


def test_a_round_without_scores_leaves_the_gate_as_it_is(small, no_figures, monkeypatch):
    measure = Stage.measure

    def measure_nothing_later(self, progress=None):
        mass = measure(self)
        return mass if self.iteration == 0 else dict.fromkeys(mass, 0.0)

    monkeypatch.setattr(Stage, "measure", measure_nothing_later)
    path = train(small()).path
    first, *later = [line["active"] for line in lines(path / "gates.jsonl")]
    assert later == [first, first]
    assert (path / "train.log").read_text().count("the gate stays as it is") == 1


def test_a_first_round_without_scores_stops_the_run(small, monkeypatch):
    monkeypatch.setattr(Stage, "measure", lambda self, _: dict.fromkeys(self.network.toolbox.sites, 0.0))
    with pytest.raises(TrainingError, match=r"all Fisher scores of iteration 0 are 0.* 3 crops.*raise gate\.samples"):
        train(small())


def test_what_has_no_deterministic_form_on_a_gpu_is_refused_before_anything_is_written(small, monkeypatch):
    monkeypatch.setattr("cegate.engine.team.pick_device", lambda name: torch.device("cuda"))
    config = small(run__deterministic=True, model__head="mask2former")
    with pytest.raises(ConfigError, match=r"no deterministic form of mask2former.*use model\.head=linear"):
        train(config)
    assert not folder_of(config).exists()


def test_a_set_without_a_single_label_does_not_stop_the_run(small, no_figures):
    changes = {"data__targets__arid__label_map": "{0: ignore, 1: ignore, 2: ignore, 3: ignore, 4: ignore}"}
    result = train(small(**changes))
    assert result.after["arid"]["mIoU"] is None
    assert "| arid | – |" in (result.path / "adapter/README.md").read_text()
