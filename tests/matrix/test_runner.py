from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cegate.matrix.cells import Cell, find_cells, name_settings, plan_cells, read_configs
from cegate.matrix.display import Display, duration
from cegate.matrix.runner import Outcome, Runner
from cegate.runfolder import take_lock

# stands in for `cegate train`: each method behaves in its own way
PROGRAM = """
import json, os, pathlib, signal, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if "=" in word)
folder, method = pathlib.Path(options["run.work_dir"]), options["run.method"]
resumed = "--resume" in sys.argv
if method == "lora":
    print("Traceback: of no interest"); print("error: --data.roots.x is missing; give it"); sys.exit(1)
if method == "full":
    os.kill(os.getpid(), signal.SIGKILL)
if method == "rein":
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=resumed)
(folder / "config.yaml").write_text("{}")
(folder / "pid").write_text(str(os.getpid()))
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
(folder / "metrics.jsonl").write_text('{"iteration": 5, "split": "train", "stage": "after"}\\n')
while method == "frozen" and not asked and not resumed:
    time.sleep(0.02)
if asked:
    (folder / "saved").write_text("x"); print("interrupted after iteration 5 and saved"); sys.exit(130)
result = {"options": options, "threads": os.environ["OMP_NUM_THREADS"], "resumed": resumed}
(folder / "result.json").write_text(json.dumps(result))
"""


class Bench:
    """A matrix of one setting whose trainings are the stand-in."""

    def __init__(self, folder: Path, *methods: str, seeds=(0,), slots=("cpu",), overrides=()) -> None:
        self.output, self.text = folder / "out", StringIO()
        file = folder / "small.yaml"
        file.write_text(
            "data: {classes: [a, b], source: {kind: generated, split: arid}, targets: "
            "{north: {kind: generated, split: boreal}}}\ntrain: {iterations: 10}\n"
        )
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        self.settings = name_settings([str(file)])
        self.configs = read_configs(self.settings, methods, overrides)
        self.cells = plan_cells(self.settings, methods, seeds, self.output)
        self.slots, self.overrides = slots, overrides

    def run(self, threads: int = 1) -> Outcome:
        console = Console(file=self.text, width=200)
        with Display(console, len(self.cells), sum(cell.is_done for cell in self.cells)) as display:
            rest = {"slots": self.slots, "threads": threads, "display": display}
            program = [sys.executable, str(self.program)]
            return Runner(self.settings, self.configs, self.overrides, program=program, **rest).run(self.cells)

    def tries(self, cell: Cell) -> int:
        return cell.log.read_text().count("$ ")


def test_every_cell_runs_once_and_is_never_redone(tmp_path):
    bench = Bench(tmp_path, "gate", "random", seeds=(0, 1), slots=("cpu", "cpu"), overrides=[("gate.k", "7")])
    outcome = bench.run(threads=3)
    assert sorted(map(str, outcome.finished)) == sorted(map(str, bench.cells)) and not outcome.failed
    assert bench.run().finished == []
    assert [bench.tries(cell) for cell in bench.cells] == [1] * 4
    cell = bench.cells[-1]
    result = json.loads((cell.folder / "result.json").read_text())
    assert result["threads"] == "3" and not result["resumed"]
    given = {"gate.k": "7", "run.method": "random", "run.seed": "1", "run.work_dir": str(cell.folder)}
    assert result["options"] == given | {"run.device": "cpu"}
    assert sorted(find_cells(bench.output), key=str) == sorted(bench.cells, key=str)


def test_a_failed_cell_is_recorded_and_stops_no_other(tmp_path):
    bench = Bench(tmp_path, "lora", "full", "rein", "gate")
    outcome = bench.run()
    assert {cell.method: why for cell, why in outcome.failed.items()} == {
        "lora": "--data.roots.x is missing; give it",
        "full": "killed by SIGKILL; last words: it wrote nothing",
        "rein": "it ended without result.json; last words: it wrote nothing",
    }
    assert [cell.method for cell in outcome.finished] == ["gate"]
    assert bench.cells[0].error.read_text() == "--data.roots.x is missing; give it\n"
    assert f"log: {bench.cells[0].log}" in bench.text.getvalue() and "3 failed" in bench.text.getvalue()
    assert len(bench.run().failed) == 3 and bench.tries(bench.cells[0]) == 2


def test_a_cell_that_succeeds_at_last_is_no_longer_failed(tmp_path):
    bench = Bench(tmp_path, "gate")
    bench.cells[0].folder.parent.mkdir(parents=True)
    bench.cells[0].error.write_text("the disk was full\n")
    assert bench.run().finished == bench.cells and not bench.cells[0].error.exists()


def stop_once_running(monkeypatch, folder: Path, number: signal.Signals) -> None:
    """Send ourselves a signal as soon as a cell has got so far as to have a journal."""
    sleep = time.sleep

    def sleep_and_look(seconds):
        if (folder / "metrics.jsonl").exists() and not (folder / "asked").exists():
            (folder / "asked").write_text("x")
            os.kill(os.getpid(), number)
        sleep(seconds)

    monkeypatch.setattr("cegate.matrix.runner.time.sleep", sleep_and_look)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_matrix_saves_and_goes_on_later(tmp_path, monkeypatch, number):
    bench = Bench(tmp_path, "frozen", "gate")
    frozen, gate = bench.cells
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_once_running(patch, frozen.folder, number)
        outcome = bench.run()
    assert signal.getsignal(number) == before
    assert outcome.stopped and not outcome.finished and not outcome.failed
    assert (frozen.folder / "saved").exists() and frozen.state == "unfinished" and gate.state == "new"
    assert "every run finishes its iteration and saves" in bench.text.getvalue()
    outcome = bench.run()
    assert outcome.finished == [frozen, gate] and not outcome.stopped
    assert json.loads((frozen.folder / "result.json").read_text())["resumed"]


def test_a_cell_that_another_bench_runs_is_left_to_it(tmp_path):
    bench = Bench(tmp_path, "gate", "random")
    lock = take_lock(bench.cells[0].lock)
    outcome = bench.run()
    assert outcome.elsewhere == bench.cells[:1] and outcome.finished == bench.cells[1:]
    os.close(lock)
    assert bench.run().finished == bench.cells[:1]


def test_the_lock_outlives_a_bench_that_is_killed(tmp_path):
    """The orphan trains on: nobody may start the cell beside it."""
    bench = Bench(tmp_path, "frozen")
    cell = bench.cells[0]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from pathlib import Path; from test_runner import Bench; Bench(Path({str(tmp_path)!r}), 'frozen').run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    journal = cell.folder / "metrics.jsonl"
    wait_until(journal.exists)
    process.kill()
    process.wait()
    assert bench.run().elsewhere == [cell]
    os.kill(int((cell.folder / "pid").read_text()), signal.SIGINT)
    wait_until((cell.folder / "saved").exists)
    wait_until(lambda: is_free(cell))
    assert bench.run().finished == [cell]


def is_free(cell: Cell) -> bool:
    lock = take_lock(cell.lock)
    if lock is not None:
        os.close(lock)
    return lock is not None


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_progress_is_read_from_the_journal(tmp_path):
    bench = Bench(tmp_path, "gate", overrides=[("train.baseline", "true")])
    cell = bench.cells[0]
    runner = Runner(bench.settings, bench.configs, [], slots=["cpu"], threads=1, display=None)
    assert runner._share_done(cell) == 0
    cell.folder.mkdir(parents=True)
    journal = cell.folder / "metrics.jsonl"
    line = '{"iteration": 4, "split": "train", "stage": "before"}\n'
    journal.write_text(line + '{"iteration": 5, "spl')  # being written
    assert runner._share_done(cell) == pytest.approx(0.2)
    journal.write_text(line + '{"iteration": 10, "split": "after", "domain": "north"}\n')
    assert runner._share_done(cell) == 1.0


def test_the_rest_is_estimated_from_what_was_done_here(tmp_path):
    bench = Bench(tmp_path, "gate", "random", seeds=(0, 1))
    text = StringIO()
    display = Display(Console(file=text, width=200), total=4, done=0)
    display.started(bench.cells[0], "cpu")
    display.progress([(bench.cells[0], 0.5, 0.25, 100.0)], waiting=3.0, slots=1)  # a quarter took 100 s
    display.finished(bench.cells[0], 200.0, 0.75, left=3)
    assert text.getvalue().splitlines() == [
        "started   small gate seed 0 on cpu",
        "finished  small gate seed 0 in 3 min; 1 of 4 done, about 23 min left",
    ]


def test_the_bar_ends_where_the_work_ends(tmp_path):
    bench = Bench(tmp_path, "gate", "random", seeds=(0, 1))
    display = Display(Console(file=StringIO(), width=200), total=5, done=1)
    one, two, three, four = bench.cells
    display.started(one, "cpu")
    display.started(two, "cpu")
    display.progress([(one, 0.5, 0.0, 9.0), (two, 0.25, 0.0, 9.0)], waiting=2.0, slots=2)
    assert display.shares[0] == pytest.approx(1.75 / 5)
    display.finished(one, 10.0, 1.0, left=3)
    assert display.shares == pytest.approx([2.25 / 5, 0.25])
    display.failed(two, "it broke", left=2)
    display.skipped(three, "another bench is running it")
    display.started(four, "cpu")
    display.finished(four, 10.0, 1.0, left=0)
    assert display.shares == [1.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (95, "2 min"), (3700, "1 h 02 min"), (90000, "1 d 1 h")]
)
def test_time_spans_have_two_units(seconds, text):
    assert duration(seconds) == text
