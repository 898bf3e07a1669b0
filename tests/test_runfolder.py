"""Who may train in a folder, and what a killed process leaves there."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cegate.configfile import read_config
from cegate.errors import CheckpointError
from cegate.matrix.cells import Cell
from cegate.runfolder import (
    LOCK,
    RunFolder,
    check_folder,
    open_run,
    read_record,
    take_lock,
    writable_folder,
    write_json,
)


@pytest.fixture
def config(tmp_path: Path):
    return read_config({"run": {"work_dir": str(tmp_path / "run")}})


def begin(run: RunFolder) -> None:
    """What the first iterations of a training leave."""
    run.metrics.append({"iteration": 10, "split": "train", "stage": "after", "loss": 1.0})


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_folder_in_use_is_refused_and_left_alone(config, tmp_path, how):
    with open_run(config) as run:
        begin(run)
        (run.path / "train.log").write_text("mine")
        with pytest.raises(CheckpointError, match=r"run is in use: another process is training there; wait"):
            open_run(config, **{how: True}).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == ["run"] and (run.path / "train.log").exists()
    with open_run(config, **{how: True}) as run:
        assert (run.path / "train.log").exists() == (how == "resume")


def test_an_overwritten_run_stays_locked_in_both_places(config, tmp_path):
    with open_run(config) as run:
        begin(run)
    with open_run(config, overwrite=True) as run:
        for folder in (run.path, tmp_path / "run.old-1"):
            assert take_lock(folder / LOCK) is None, folder


def test_a_run_that_began_meanwhile_is_seen(config, monkeypatch):
    def take_late(path):
        with monkeypatch.context() as patch:
            patch.setattr("cegate.runfolder.take_lock", take_lock)
            with open_run(config) as run:
                begin(run)
        return take_lock(path)

    monkeypatch.setattr("cegate.runfolder.take_lock", take_late)
    with pytest.raises(CheckpointError, match="holds a run already"):
        open_run(config).__enter__()


def test_a_run_that_failed_before_its_first_iteration_does_not_keep_its_name(config, tmp_path):
    with open_run(config) as run:
        run.gates.append({"iteration": 0, "scores": {}, "active": []})
        for name in ("env.json", "nan_batch.json"):
            write_json(run.path / name, {})
    other = replace(config, train=replace(config.train, lr=0.5))
    with open_run(other) as run:
        assert run.config().train.lr == 0.5 and run.gates.records == []
        assert not (run.path / "nan_batch.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds a run already"):
        check_folder(config)


def test_a_config_of_the_users_own_is_no_failed_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("# mine\n")
    with pytest.raises(CheckpointError, match="holds a run already"):
        open_run(config).__enter__()
    assert (tmp_path / "run/config.yaml").read_text() == "# mine\n"


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_place_that_takes_no_folder_is_named_before_any_work(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{place} cannot be written to \((Not a directory|File exists)\); give"):
        writable_folder(tmp_path / place, "--output")


def test_a_worker_that_outlives_its_run_does_not_keep_it(config):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def work():
        ready.set()
        done.wait(60)

    with open_run(config):
        worker = context.Process(target=work)
        worker.start()
        ready.wait(60)
    try:
        with open_run(config, resume=True):
            pass
    finally:
        done.set()
        worker.join()


def test_a_cell_is_locked_apart_from_its_run(tmp_path):
    cell = Cell("setting", "gate", 0, tmp_path / "seed_0")
    held = take_lock(cell.lock)
    with open_run(read_config({"run": {"work_dir": str(cell.folder)}})) as run:
        assert held is not None and (run.path / "config.yaml").is_file()


def test_a_file_system_without_locks_is_warned_of(config, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_run(config):
        assert "this file system has no locks" in caplog.text


def test_a_run_killed_in_its_first_write_can_start_again(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK).touch()
    (folder / ".config.ab_12xyz.yaml").write_text("half")
    assert check_folder(config) == folder
    with open_run(config) as run:
        assert sorted(path.name for path in run.path.iterdir()) == [LOCK, "config.yaml"]


def test_leftovers_of_killed_writes_go_and_other_files_stay(config, tmp_path):
    with open_run(config) as run:
        pass
    ours = ["checkpoints/.last.ab_12xyz.pt", "checkpoints/.iter_6.00000000.pt", ".result.abcdefgh.json"]
    others = ["checkpoints/last.pt", ".notes.abcdefgh.txt", ".report.abcdefgh.html", "checkpoints/.last.pt"]
    for name in (*ours, *others):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).touch()
    with open_run(config, resume=True):
        assert not any((run.path / name).exists() for name in ours)
        assert all((run.path / name).exists() for name in others)


def test_leftovers_of_killed_evaluations_go_too(config, tmp_path):
    with open_run(config) as run:
        pass
    ours = ["eval/arid/.metrics.ab_12xyz.json", "eval/arid/.tiles.00000000.npz", "eval/source/.confusion.abcdefgh.npy"]
    others = ["eval/arid/metrics.json", "eval/.notes.abcdefgh.txt", "eval/arid/mine/.notes.abcdefgh.txt"]
    for name in (*ours, *others):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    with open_run(config, resume=True):
        assert not any((run.path / name).exists() for name in ours)
        assert all((run.path / name).exists() for name in others)


def test_what_cannot_be_written_is_one_line_and_a_folder_that_went_is_told_apart(config):
    with open_run(config) as run:
        with (
            pytest.raises(CheckpointError, match=r"run could not be written \(No space left on device\); make room"),
            run.writing(),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        shutil.rmtree(run.path)
        with pytest.raises(CheckpointError, match=r"run was removed or moved"), run.writing():
            raise AssertionError("nothing is written any more")


@pytest.mark.parametrize("text", ["[]", '"x"', "\0", "[" * 99_999], ids=["list", "text", "binary", "deep"])
def test_a_json_file_of_anything_else_is_refused(tmp_path, text):
    (tmp_path / "env.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"env\.json (holds no|cannot be read: .*; restore the file from a copy)"):
        read_record(tmp_path / "env.json")
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read: No such file or directory; restore"):
        read_record(tmp_path / "result.json")
