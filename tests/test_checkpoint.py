from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import cegate
from cegate import checkpoint
from cegate.backbone.vit import tiny_vit, weight_hash
from cegate.checkpoint import (
    State,
    keep_newest,
    load_adapter,
    load_checkpoint,
    load_state,
    restore,
    save_adapter,
    save_state,
)
from cegate.errors import BackboneError, CheckpointError
from cegate.gate import GatePlan
from cegate.runfolder import Journal, RunFolder, written_aside

MAPPING = {
    "data": {"classes": ["land", "water"], "crop": 32},
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
}
SITES = ("spatial.1", "semantic.0", "frequency.7")


def trained(**changes) -> cegate.api.Segmenter:
    """A model whose every trained weight is random, with three sites on."""
    segmenter = cegate.build({**MAPPING, **changes})
    with torch.no_grad():
        for value in checkpoint.trained_weights(segmenter).values():
            value.copy_(0.3 * torch.randn(value.shape))
    segmenter.toolbox.apply(GatePlan(SITES[:2], SITES[2:]))
    return segmenter.eval()


@pytest.fixture
def segmenter():
    return trained()


@pytest.fixture
def folder(segmenter, tmp_path) -> Path:
    segmenter.recipe = dataclasses.replace(segmenter.recipe, value_range=[[0.0, 1000.0]] * 3)
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {"arid": 0.5})
    return tmp_path / "adapter"


def state_of(segmenter, **changes) -> State:
    values = {
        "stage": "after",
        "iteration": 3,
        "trained": checkpoint.trained_weights(segmenter),
        "active": list(SITES),
        "frozen": [],
        "ever_active": list(SITES),
        "backbone_sha256": weight_hash(segmenter.vit),
        "classes": list(segmenter.classes),
    }
    return State(**values | changes)


def test_an_adapter_gives_the_same_predictions(segmenter, folder):
    loaded = cegate.load(folder, "cpu")
    image = np.random.default_rng(0).integers(0, 1000, (3, 40, 50)).astype(np.uint16)
    assert np.array_equal(loaded.predict_proba(image), segmenter.predict_proba(image))
    assert loaded.toolbox.plan == segmenter.toolbox.plan
    assert not loaded.training and loaded.classes == ("land", "water")
    assert np.array_equal(cegate.load(folder.parent, "cpu").predict(image), segmenter.predict(image))


def test_an_adapter_holds_trained_sites_and_head_only(segmenter, folder):
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    sites = {".".join(key.split(".")[1:3]) for key in weights if key.startswith("toolbox.")}
    assert sites == set(SITES)
    rest = {key for key in weights if not key.startswith("toolbox.")}
    assert rest == {f"head.{key}" for key in segmenter.head.state_dict()}


def test_adapter_config_has_the_promised_keys(folder):
    description = json.loads((folder / "adapter_config.json").read_text())
    promised = "format_version cegate_version backbone backbone_sha256 image_size patch_size toolbox active_sites head"
    assert set(promised.split()) <= description.keys()
    assert {"classes", "palette", "bands", "mean", "std", "ignore", "value_range"} <= description.keys()
    assert description["active_sites"] == list(SITES[:2]) and description["frozen_sites"] == list(SITES[2:])
    card = (folder / "README.md").read_text()
    assert "| arid | 50.0 |" in card and "land, water" in card and description["backbone_sha256"] in card


def rewrite(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_sha256": "0" * 64}, "trained on a backbone with sha256 000000000000, this one"),
        ({"seed": 7}, "trained on a backbone with sha256"),
        ({"classes": ["land", "water", "road"], "palette": ["#000000"] * 3}, "of another shape head."),
        ({"active_sites": ["spatial.2", *SITES]}, "missing toolbox.spatial.2"),
        ({"active_sites": [], "frozen_sites": []}, "unexpected toolbox.frequency.7.down"),
        ({"active_sites": ["spatial.99"]}, "names the site 'spatial.99', which the backbone does not have"),
        ({"format_version": 99}, "has format_version 99; this cegate"),
        (
            {"head": "liner"},
            "model.head=liner is not accepted; expected linear, mask2former or unetformer; did you mean 'linear'?",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_does_not_fit_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder, "cpu")
    assert message in str(error.value)


def test_backbone_weights_may_lie_elsewhere_than_in_training(tmp_path):
    safetensors.torch.save_file(tiny_vit(32).state_dict(), tmp_path / "old.safetensors")
    mapping = MAPPING | {"model": MAPPING["model"] | {"weights": str(tmp_path / "old.safetensors")}}
    segmenter = cegate.build(mapping)
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    (tmp_path / "old.safetensors").rename(tmp_path / "new.safetensors")
    with pytest.raises(BackboneError, match=r"old\.safetensors does not exist; .*--weights FILE, or cegate\.load\("):
        cegate.load(tmp_path / "adapter", "cpu")
    loaded = cegate.load(tmp_path / "adapter", "cpu", weights=tmp_path / "new.safetensors")
    assert weight_hash(loaded.vit) == weight_hash(segmenter.vit)


def test_a_description_without_a_key_names_it(folder):
    description = json.loads((folder / "adapter_config.json").read_text())
    del description["mean"], description["bands"]
    (folder / "adapter_config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="lacks bands, mean"):
        load_adapter(folder, "cpu")


def test_damaged_files_are_named(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapter(folder, "cpu")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        load_adapter(folder, "cpu")
    with pytest.raises(CheckpointError, match="neither a run nor an adapter folder"):
        load_adapter(folder / "nowhere", "cpu")


def test_backbone_weights_may_lie_elsewhere(folder, tmp_path):
    rewrite(folder, backbone_weights=str(tmp_path / "gone.pth"))
    with pytest.raises(BackboneError, match=r"gone\.pth does not exist"):
        load_adapter(folder, "cpu")
    vit = cegate.build(MAPPING).vit
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "moved.safetensors")
    assert load_adapter(folder, "cpu", weights=str(tmp_path / "moved.safetensors")).toolbox.plan.active


def test_a_state_restores_weights_and_plan(segmenter, tmp_path):
    save_state(tmp_path / "last.pt", state_of(segmenter))
    fresh = cegate.build(MAPPING)
    restore(fresh, load_state(tmp_path / "last.pt"), "last.pt")
    for key, value in checkpoint.trained_weights(segmenter).items():
        assert torch.equal(value, checkpoint.trained_weights(fresh)[key])
    assert set(fresh.toolbox.plan.active) == set(SITES)


def test_a_state_without_times_and_memory_is_read(segmenter, tmp_path):
    values = dict(vars(state_of(segmenter)))
    for name in ("step_seconds", "score_seconds", "peak_memory_bytes", "config"):  # as older versions wrote it
        del values[name]
    torch.save(values | {"format_version": 1}, tmp_path / "last.pt")
    state = load_state(tmp_path / "last.pt")
    assert (state.iteration, state.step_seconds, state.peak_memory_bytes) == (3, [], None)


def test_the_baseline_is_never_taken_for_the_best(segmenter, tmp_path):
    run, config = RunFolder(tmp_path), segmenter.config
    save_state(run.last, state_of(segmenter, stage="before"))
    with pytest.raises(CheckpointError, match=r"no best checkpoint yet.* after 3 iterations; .* the checkpoint last"):
        load_checkpoint(run, "best", config, "cpu")
    assert load_checkpoint(run, "last", config, "cpu").classes == segmenter.classes
    save_state(run.last, state_of(segmenter))
    assert set(load_checkpoint(run, "best", config, "cpu").toolbox.plan.active) == set(SITES)
    with pytest.raises(CheckpointError, match=r"no checkpoint bst; use best, last or a path; did you mean 'best'\?"):
        load_checkpoint(run, "bst", config, "cpu")


def test_a_state_of_other_classes_or_another_backbone_is_refused(segmenter):
    other = cegate.build({**MAPPING, "data": {"classes": ["land", "road"], "crop": 32}})
    with pytest.raises(CheckpointError, match=r"last\.pt was trained for the classes land, water, not land, road"):
        restore(other, state_of(segmenter), "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt was trained on a backbone with sha256 abc"):
        restore(segmenter, state_of(segmenter, backbone_sha256="abc"), "last.pt")
    lost = state_of(segmenter)
    del lost.trained["toolbox.spatial.3.up_q"]
    with pytest.raises(CheckpointError, match=r"missing toolbox\.spatial\.3\.up_q"):
        restore(segmenter, lost, "last.pt")


def test_a_refused_state_changes_nothing(segmenter):
    before = {key: value.clone() for key, value in checkpoint.trained_weights(segmenter).items()}
    wrong = state_of(trained())
    wrong.trained["head.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unexpected head\.extra"):
        restore(segmenter, wrong, "last.pt")
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.trained_weights(segmenter).items())


def test_a_failed_save_leaves_the_old_checkpoint(segmenter, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_state(path, state_of(segmenter))
    good = path.read_bytes()

    def half(value, target):
        target.write(b"half of a checkpoint, and more")
        raise ZeroDivisionError

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ZeroDivisionError):
        save_state(path, state_of(segmenter))
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_unreadable_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.pt"):
        load_state(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint"):
        load_state(tmp_path / "last.pt")
    torch.save({"format_version": 0}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"has format 0; this cegate .* reads formats 1 to 2"):
        load_state(tmp_path / "last.pt")


@pytest.mark.parametrize(("keep", "left"), [(0, []), (2, ["iter_20.pt", "iter_100.pt"]), (9, None)])
def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path, keep, left):
    names = ["iter_3.pt", "iter_20.pt", "iter_100.pt"]
    for name in [*names, "last.pt"]:
        (tmp_path / name).touch()
    keep_newest(tmp_path, keep)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", *(names if left is None else left)}


def test_written_aside_replaces_only_when_all_went_well(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with written_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o444

    def fail():
        with written_aside(path) as aside:
            aside.write_text("newer")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_journal_survives_a_cut_line_and_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append({"iteration": 1, "loss": float("nan")})
    journal.append({"iteration": 2, "loss": 0.1})
    with path.open("a") as file:
        file.write('{"iteration": 3, "lo')
    again = Journal(path)
    assert again.records == [{"iteration": 1, "loss": None}, {"iteration": 2, "loss": 0.1}]
    again.keep(lambda record: record["iteration"] < 2)
    again.append({"iteration": 2, "loss": 0.2})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_bytes('{"domain": "caf\u2028é"}\n{"domain": "é'.encode()[:-1])  # cut within the character
    again = Journal(path)
    assert again.records == [{"domain": "caf\u2028é"}]
    again.keep(lambda record: True)
    assert Journal(path).records == again.records
    path.write_text("oops\n{}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 1 is no JSON"):
        Journal(path)


@pytest.mark.parametrize("room", [0, 100, 5_000, 60_000], ids=str)
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(segmenter, tmp_path, monkeypatch, room):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=r"\(No space left on device\), there was none before it; make room"):
        save_on_a_disk_of(room, path, state_of(segmenter), monkeypatch)
    assert not list(tmp_path.iterdir())
    save_state(path, state_of(segmenter))
    good = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"last\.pt could not be .* the one before it is whole") as error:
        save_on_a_disk_of(room, path, state_of(trained()), monkeypatch)
    assert isinstance(error.value.__cause__, OSError) and "\n" not in str(error.value)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def save_on_a_disk_of(room: int, path: Path, state: State, monkeypatch) -> None:
    """Save where so many bytes fit, below torch's own writer."""
    from cegate.checkpoint import _Signed

    class Disk:
        def __init__(self, file) -> None:
            self.file, self.room = file, room

        def write(self, data) -> int:
            if len(data) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(data)
            return self.file.write(data)

    begin = _Signed.__init__
    with monkeypatch.context() as patch:
        patch.setattr(_Signed, "__init__", lambda self, file: begin(self, Disk(file)))
        save_state(path, state)


def test_a_flipped_bit_anywhere_is_refused(segmenter, tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, state_of(segmenter))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    ends = [0, 1, len(good) - 1, *(len(good) - 78 - np.arange(30)), *(len(good) - np.arange(1, 79, 7))]
    for place in [*rng.integers(0, len(good), 40).tolist(), *ends]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint"):
            load_state(path)
    for cut in (len(good) - 1, len(good) - 78, len(good) // 2, 0):
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint"):
            load_state(path)
    path.write_bytes(good)
    assert load_state(path).iteration == 3


def as_format_1(state: State) -> dict:
    """What older versions wrote with plain `torch.save`."""
    new = ("tasks", "task_weights", "class_pixels", "elapsed_seconds", "config")
    old = {name: value for name, value in vars(state).items() if name not in new}
    return old | {"objective": state.tasks.get("dacs", {}), "format_version": 1}


def test_a_checkpoint_of_an_older_version_is_read_and_its_weights_are_checked(segmenter, tmp_path):
    path, seen = tmp_path / "last.pt", {"mixed": [1.5], "confident": []}
    torch.save(as_format_1(state_of(segmenter, tasks={"dacs": {"seen": seen}})), path)
    state = load_state(path)
    assert state.tasks == {"dacs": {"seen": seen}} and state.config == "" and state.task_weights == {}
    restore(cegate.build(MAPPING), state, path)
    good = path.read_bytes()
    weights = max((segmenter.head.state_dict().values()), key=torch.Tensor.numel).numpy().tobytes()
    place = good.index(weights) + len(weights) // 2
    path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged .*\(the checksum of its record .*data/\d+ is another\)"):
        load_state(path)


def test_a_checkpoint_of_a_newer_version_is_refused_by_what_it_holds(segmenter, tmp_path):
    state = state_of(segmenter)
    state.styles = {}
    save_state(tmp_path / "last.pt", state)
    with pytest.raises(CheckpointError, match=r"holds styles, which this cegate .* does not know; use the version"):
        load_state(tmp_path / "last.pt")
