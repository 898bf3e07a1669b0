"""Nothing lost, nothing silently wrong: what comes from outside while a run trains, and what its labels do not say."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from cegate.checkpoint import load_state, save_state
from cegate.configfile import to_yaml
from cegate.data import sets, stream
from cegate.data.stream import WorkerLostError
from cegate.engine import recorder
from cegate.engine.runtime import Interrupt
from cegate.engine.stage import Stage
from cegate.engine.trainer import train
from cegate.errors import CheckpointError, TrainingError
from cegate.runfolder import folder_of, read_json, write_json
from cegate.train import main

pytestmark = pytest.mark.usefixtures("no_figures")
SHORT = {
    "data__validation": "null",
    "data__targets": "{arid: {kind: generated, split: arid, limit: 2, tile: 32}}",
    "train__iterations": 4,
    "train__checkpoint_every": 2,
    "train__eval_every": 4,
}


def at_step(monkeypatch, iteration: int, what, stage: str = "after") -> None:
    """Do something before a step."""
    step = Stage.step

    def step_and_more(self, data):
        if (self.name, self.iteration) == (stage, iteration):
            what(self)
        return step(self, data)

    monkeypatch.setattr(Stage, "step", step_and_more)


@pytest.fixture
def whole(small, request) -> Path:
    """One uninterrupted run for all tests of this file, which leave it as it is."""
    cache = request.config.stash.setdefault(WHOLE, {})
    if "path" not in cache:
        cache["path"] = train(small("whole", **SHORT)).path
    return cache["path"]


WHOLE = pytest.StashKey[dict]()


def assert_equal(cut: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


# --- signals, workers, folders --------------------------------------------------------------------------------------


@pytest.fixture
def default_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_saves_as_ctrl_c_does(small, whole, monkeypatch, default_signals, tmp_path, number):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda stage: os.kill(os.getpid(), number))
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted after iteration 3 and saved; go on with: .* --resume"
        ):
            train(small("cut", **SHORT))
    assert signal.getsignal(number) is signal.SIG_DFL
    assert load_state(tmp_path / "cut/checkpoints/last.pt").iteration == 3
    assert_equal(train(small("cut", **SHORT), resume=True).path, whole)


def test_under_nohup_a_closing_terminal_is_nothing(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.asked
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_interrupt_ends_an_evaluation_between_two_images(small, whole, monkeypatch, default_signals, tmp_path):
    config, confusion, seen = small("cut", **SHORT), recorder.evaluator.Confusion.update, []

    def update_and_interrupt(self, *args):
        seen.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return confusion(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.evaluator.Confusion, "update", update_and_interrupt)
        with pytest.raises(KeyboardInterrupt, match="after iteration 4 and saved"):
            train(config)
    assert len(seen) == 1
    assert_equal(train(config, resume=True).path, whole)


def test_a_killed_worker_is_one_line_and_what_is_done_is_saved(small, whole, monkeypatch, tmp_path):
    config = small("cut", **SHORT, data__workers=1)
    with monkeypatch.context() as patch:
        step = Stage.step

        def step_and_kill(self, data):
            loss = step(self, data)
            if self.iteration == 2:
                multiprocessing.active_children()[0].kill()
            return loss

        patch.setattr(Stage, "step", step_and_kill)
        with pytest.raises(WorkerLostError, match=r"worker was killed.*fewer data\.workers.*go on with: ") as error:
            train(config)
    assert "\n" not in str(error.value)
    assert load_state(tmp_path / "cut/checkpoints/last.pt").iteration >= 2
    assert_equal(train(config, resume=True).path, whole)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_is_not_waited_for_without_end(monkeypatch, how):
    """Each batch is a tensor that must be asked of its worker, which no time limit of torch covers."""
    monkeypatch.setattr(stream, "PATIENCE_S", 1.0)
    before = multiprocessing.active_children()
    batches = stream.fetch(torch.tensor, range(50), 1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()).difference(before)
    os.kill(worker.pid, how)
    why = "gave nothing for 1 s" if how == signal.SIGSTOP else "was killed"
    with pytest.raises(WorkerLostError, match=f"a data worker {why}"):
        list(batches)
    assert not worker.is_alive()


def test_a_worker_that_the_system_calls_stopped_is_given_up_long_before_a_slow_one(monkeypatch):
    monkeypatch.setattr(stream, "STOPPED_S", 0.5)
    before = multiprocessing.active_children()
    batches = stream.fetch(torch.tensor, range(50), 1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()).difference(before)
    began = time.monotonic()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerLostError, match=r"a data worker gave nothing for [0-9]+ s"):
        list(batches)
    assert time.monotonic() - began < 30


def test_errors_that_are_not_of_a_worker_stay_what_they_are():
    assert stream.worker_lost(RuntimeError("CUDA error")) is None
    assert stream.worker_lost(ValueError("DataLoader worker (pid 1) is killed")) is None
    lost = stream.worker_lost(RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible"))
    assert "was killed (Bus error), as when memory or /dev/shm runs out" in str(lost)


def test_a_folder_that_goes_away_ends_the_run_and_is_not_made_anew(small, monkeypatch, tmp_path):
    at_step(monkeypatch, 3, lambda stage: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"run was removed or moved while it was trained in, so the run stops"):
        train(small(**SHORT))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_in_one_line(small, whole, monkeypatch, tmp_path, capsys):
    config = small("cut", **SHORT)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda stage: limit_files(patch, 20_000))
        assert main(["--config", str(tmp_path / "config.yaml")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"last\.pt could not be written \(No space left on device\), the one before it is whole", line)
    assert [file.name for file in (tmp_path / "cut/checkpoints").glob(".*")] == []
    assert load_state(tmp_path / "cut/checkpoints/last.pt").iteration == 2
    assert_equal(train(config, resume=True).path, whole)


def limit_files(patch: pytest.MonkeyPatch, size: int) -> None:
    """No checkpoint has room for more bytes."""
    from cegate import checkpoint

    put = checkpoint._Signed._put

    def put_what_fits(self, data):
        self.room = getattr(self, "room", size) - len(data)
        if self.room < 0:
            self.file.write = lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        put(self, data)

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

    begin = checkpoint._Signed.__init__
    patch.setattr(checkpoint._Signed, "__init__", lambda self, file: begin(self, File(file)))
    patch.setattr(checkpoint._Signed, "_put", put_what_fits)


# --- what a resume goes on from -------------------------------------------------------------------------------------


@pytest.fixture
def finished(small, whole) -> Path:
    """A copy of the whole run where `small` puts its run."""
    return shutil.copytree(whole, folder_of(small(**SHORT)))


def test_a_checkpoint_of_another_seed_or_configuration_is_refused_by_name(small, finished):
    last = finished / "checkpoints/last.pt"
    for changes, keys in (({"run__seed": 3}, r"run\.seed"), ({"train__lr": 0.5, "gate__k": 3}, r"gate\.k, train\.lr")):
        save_state(last, with_config(load_state(last), to_yaml(small(**SHORT, **changes))))
        with pytest.raises(CheckpointError, match=rf"last\.pt is of a run with other values of {keys}; put back"):
            train(small(**SHORT), resume=True)
    save_state(last, with_config(load_state(last), to_yaml(small(**SHORT, data__workers=1))))
    train(small(**SHORT), resume=True)
    save_state(last, with_config(load_state(last), ""))  # an older version kept none
    train(small(**SHORT), resume=True)


def with_config(state, text: str):
    state.config = text
    return state


def test_another_number_of_threads_is_warned_of(small, finished, caplog):
    environment = read_json(finished / "env.json")
    write_json(finished / "env.json", environment | {"threads": 7})
    train(small(**SHORT), resume=True)
    threads = torch.get_num_threads()
    assert f"started with 7 threads and goes on with {threads}: sums come out in another order" in caplog.text
    assert "set OMP_NUM_THREADS=7" in caplog.text


def test_a_resume_without_its_checkpoint_is_refused_and_loses_nothing(small, finished):
    (finished / "checkpoints/last.pt").unlink()
    files = {
        name: (finished / name).read_bytes() for name in ("metrics.jsonl", "gates.jsonl", "env.json", "result.json")
    }
    with pytest.raises(CheckpointError, match=r"last\.pt is missing, though the run came to iteration 4; put it back"):
        train(small(**SHORT), resume=True)
    assert files == {name: (finished / name).read_bytes() for name in files}


def test_a_numbered_checkpoint_lost_before_its_copy_is_made_again(small, finished):
    numbered = finished / "checkpoints/iter_4.pt"
    assert numbered.read_bytes() == (finished / "checkpoints/last.pt").read_bytes()
    numbered.rename(finished / "checkpoints/iter_2.pt")
    train(small(**SHORT), resume=True)
    assert [file.name for file in (finished / "checkpoints").glob("iter_*")] == ["iter_4.pt"]


def test_times_add_up_over_a_resume(small, monkeypatch, caplog):
    config = small("cut", **SHORT)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda stage: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    last = folder_of(config) / "checkpoints/last.pt"
    state = load_state(last)
    assert state.elapsed_seconds > 0
    state.elapsed_seconds = 5000.0
    save_state(last, state)
    train(config, resume=True)
    assert load_state(last).elapsed_seconds > 5000
    assert re.search(r"finished in [5-9]\d\d\d s", caplog.text)


# --- labels that say nothing ----------------------------------------------------------------------------------------


@pytest.fixture
def masks(tmp_path):
    """Writes a set whose masks are full of one value."""

    def write(value: int) -> str:
        for number in range(3):
            for folder, count in (("images", 3), ("masks", 1)):
                path = tmp_path / f"set/{folder}/{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 255, (count, 40, 40), dtype=np.uint8)
                with rasterio.open(path, "w", driver="PNG", width=40, height=40, count=count, dtype="uint8") as file:
                    file.write(pixels if count == 3 else np.full_like(pixels, value))
        return f"{{root: {tmp_path / 'set'}}}"

    return write


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("method", ["none", "random", "all"])
def test_a_set_that_is_all_ignored_does_not_train(small, masks, method, monkeypatch):
    """Where the look at a sample of the masks, before training, has missed it."""
    monkeypatch.setattr(sets, "check_labels", lambda *_, **__: None)
    source = {"data__source": masks(255), "data__targets": "{}"}
    with pytest.raises(
        TrainingError, match=r"no pixel of the 8 crops of the first 4 iterations has a label.*label_map"
    ):
        train(small(**{**SHORT, **source, "gate__method": method}))


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_class_that_is_never_seen_is_named_at_the_end(small, masks, finished):
    source = {"data__source": masks(2), "data__targets": "{}", "gate__method": "none"}
    (_, note) = train(small("one", **{**SHORT, **source})).notes
    assert note.startswith("No crop of data.source showed a pixel of background, building, road, water:")
    assert len(train(small(**SHORT), resume=True).notes) == 1
