from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import cegate
from cegate import checkpoint
from cegate.backbone.vit import weight_hash
from cegate.checkpoint import (
    State,
    keep_newest,
    load_checkpoint,
    load_state,
    restore,
    save_state,
)
from cegate.errors import CheckpointError
from cegate.runfolder import Journal, RunFolder, written_aside

SITES = ("spatial.1", "semantic.0", "frequency.7")


@pytest.fixture
def segmenter(trained):
    return trained()


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


def test_a_state_restores_weights_and_plan(segmenter, tmp_path, trained):
    save_state(tmp_path / "last.pt", state_of(segmenter))
    fresh = cegate.build(trained.mapping)
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


def test_a_state_of_other_classes_or_another_backbone_is_refused(segmenter, trained):
    other = cegate.build({**trained.mapping, "data": {"classes": ["land", "road"], "crop": 32}})
    with pytest.raises(CheckpointError, match=r"last\.pt was trained for the classes land, water, not land, road"):
        restore(other, state_of(segmenter), "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt was trained on a backbone with sha256 abc"):
        restore(segmenter, state_of(segmenter, backbone_sha256="abc"), "last.pt")
    lost = state_of(segmenter)
    del lost.trained["toolbox.spatial.3.up_q"]
    with pytest.raises(CheckpointError, match=r"missing toolbox\.spatial\.3\.up_q"):
        restore(segmenter, lost, "last.pt")


def test_a_refused_state_changes_nothing(segmenter, trained):
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
    names, others = ["iter_3.pt", "iter_20.pt", "iter_100.pt"], {"last.pt", "iter_20_mine.pt"}
    for name in [*names, *others]:
        (tmp_path / name).touch()
    keep_newest(tmp_path, keep)
    assert {path.name for path in tmp_path.iterdir()} == {*others, *(names if left is None else left)}


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


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "5", "null", "[]", '{"iteration": "x", "split": "after"}'),
        '{"iteration": 1, "split": "train", "stage": "nope", "scores": {"spatial.0": "x"}, "active": []}',
        '{"iteration": -1, "split": "after", "scores": {}, "active": []}',
        '{"iteration": 1, "split": "after", "loss": "x", "scores": {}, "active": [1]}',
    ],
)
def test_a_journal_of_anything_else_is_refused_by_its_line(tmp_path, line):
    for name in ("metrics", "gates"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"{line}\n")
        with pytest.raises(
            CheckpointError, match=rf"{name}\.jsonl line 1(:| is no record).*; restore the file from a cop"
        ):
            RunFolder(tmp_path)
        path.unlink()


@pytest.mark.parametrize("room", [0, 100, 5_000, 60_000], ids=str)
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(segmenter, tmp_path, monkeypatch, room, trained):
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


def test_a_checkpoint_of_an_older_version_is_read_and_its_weights_are_checked(segmenter, tmp_path, trained):
    path, seen = tmp_path / "last.pt", {"mixed": [1.5], "confident": []}
    torch.save(as_format_1(state_of(segmenter, tasks={"dacs": {"seen": seen}})), path)
    state = load_state(path)
    assert state.tasks == {"dacs": {"seen": seen}} and state.config == "" and state.task_weights == {}
    restore(cegate.build(trained.mapping), state, path)
    good = path.read_bytes()
    weights = max((segmenter.head.state_dict().values()), key=torch.Tensor.numel).numpy().tobytes()
    place = good.index(weights) + len(weights) // 2
    path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged .*\(the checksum of its record .*data/\d+ is another\)"):
        load_state(path)


def test_a_flipped_bit_in_a_record_of_an_older_checkpoint_is_refused_or_changes_nothing(segmenter, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(as_format_1(state_of(segmenter)), path)
    good, expected = path.read_bytes(), load_state(path)
    entry = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02") + 200)  # of a weight, in the archive's directory
    passed = 0
    for place in range(entry, entry + 46):
        for bit in (0, 4):  # 0x10 of the attributes means a folder, which torch reads as memory that nobody wrote
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            try:
                state = load_state(path)
            except CheckpointError:
                continue
            passed += 1
            assert {k: v.numpy().tobytes() for k, v in state.trained.items()} == {
                k: v.numpy().tobytes() for k, v in expected.trained.items()
            }, place - entry
    assert passed < 20


def test_a_checkpoint_of_a_newer_version_is_refused_by_what_it_holds(segmenter, tmp_path):
    state = state_of(segmenter)
    state.styles = {}
    save_state(tmp_path / "last.pt", state)
    with pytest.raises(CheckpointError, match=r"holds styles, which this cegate .* does not know; use the version"):
        load_state(tmp_path / "last.pt")


@pytest.mark.parametrize("value", [None, "x", -1, [1, [2]], {"a": 1}], ids=repr)
def test_what_is_not_of_its_kind_is_refused_by_name(segmenter, tmp_path, value):
    good = state_of(segmenter)
    for name in ("stage", "trained", "active", "backbone_sha256", "classes", "tasks"):
        if type(value) is type(getattr(good, name)) and name not in ("stage", "trained", "active"):
            continue
        state = state_of(segmenter)
        save_state(tmp_path / "last.pt", state)  # the sites become texts there
        values = torch.load(tmp_path / "last.pt", weights_only=True) | {name: value}
        write_signed(tmp_path / "last.pt", values)
        with pytest.raises(CheckpointError, match=rf"last\.pt holds what is no {name} of a checkpoint"):
            load_state(tmp_path / "last.pt")


def write_signed(path: Path, values: dict) -> None:
    from cegate.checkpoint import _Signed

    with path.open("wb") as file:
        sink = _Signed(file)
        torch.save(values, sink)
        sink.sign()
