"""Runs cells as processes, one at a time on each slot: locked, resumable, and stopped so that they save."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from cegate.config import Config
from cegate.matrix.cells import Cell, Overrides, Setting
from cegate.matrix.display import Display
from cegate.runfolder import take_lock, write_text

PROGRAM = (sys.executable, "-m", "cegate.train")
POLL_SECONDS, PROGRESS_SECONDS = 0.1, 2.0
SAVE, KILL = signal.SIGINT, signal.SIGKILL
TAIL_BYTES = 2**14


@dataclass
class Outcome:
    """What became of the cells that were to be run."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    """Cell -> why, in one line."""
    elsewhere: list[Cell] = field(default_factory=list)
    """Cells that another bench was running."""
    stopped: bool = False
    """Whether Ctrl-C or a signal ended it early; what ran has saved."""


@dataclass
class Job:
    """A cell that is running."""

    cell: Cell
    slot: int
    process: subprocess.Popen
    lock: int
    log_start: int
    """Bytes of its log that are not the process's."""
    began: float
    at_start: float
    """Share of the cell that was done before."""


class Runner:
    """Runs cells.

    Args:
        settings: where the configuration of each setting is.
        configs: (setting, method) -> configuration, for the number of iterations.
        overrides: passed on to every cell.
        slots: the device of each process that may run at a time.
        threads: CPU threads of each process.
        display: told of all that happens.
        program: the training command; default this Python's `cegate train`.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        configs: Mapping[tuple[str, str], Config],
        overrides: Overrides,
        *,
        slots: Sequence[str],
        threads: int,
        display: Display,
        program: Sequence[str] | None = None,
    ) -> None:
        self.settings = {setting.name: setting for setting in settings}
        self.configs, self.overrides = configs, overrides
        self.slots, self.threads = list(slots), threads
        self.display, self.program = display, list(program or PROGRAM)
        self.jobs: list[Job] = []
        self.outcome = Outcome()

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run what is not done; a cell that fails does not stop the others.

        The first Ctrl-C (or SIGTERM, SIGHUP) asks every process to save, the second to stop at once, the third kills.
        """
        todo = deque(cell for cell in cells if not cell.is_done)
        shown = 0.0
        with _Signals() as signals:
            try:
                while self.jobs or (todo and not signals.count):
                    while todo and not signals.count and len(self.jobs) < len(self.slots):
                        self._start(todo.popleft())
                    self._pass_on(signals)
                    if time.monotonic() - shown >= PROGRESS_SECONDS:
                        self._show(todo)
                        shown = time.monotonic()
                    time.sleep(POLL_SECONDS)
                    self._collect(todo, stopping=signals.count > 0)
            finally:
                for job in self.jobs:  # only after an error of our own
                    job.process.send_signal(SAVE)
        self.outcome.stopped = signals.count > 0
        return self.outcome

    def _start(self, cell: Cell) -> None:
        lock = take_lock(cell.lock)
        if lock is None:
            self.outcome.elsewhere.append(cell)
            self.display.skipped(cell, "another bench is running it")
            return
        if cell.is_done:  # by another bench, a moment ago
            os.close(lock)
            self.outcome.finished.append(cell)
            self.display.skipped(cell, "another bench has finished it", done=True)
            return
        cell.error.unlink(missing_ok=True)
        slot = min(set(range(len(self.slots))) - {job.slot for job in self.jobs})
        command = self._command(cell, self.slots[slot])
        with cell.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            log_start = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
                pass_fds=[lock],  # the lock lives as long as the process, even if we are killed
            )
        self.jobs.append(Job(cell, slot, process, lock, log_start, time.monotonic(), self._share_done(cell)))
        self.display.started(cell, self.slots[slot])

    def _command(self, cell: Cell, device: str) -> list[str]:
        options = [
            *self.overrides,
            *self.settings[cell.setting].overrides,
            ("run.method", cell.method),
            ("run.seed", str(cell.seed)),
            ("run.work_dir", str(cell.folder)),
            ("run.device", device),
        ]
        given = [f"--{key}={value}" for key, value in options]
        resume = ["--resume"] if cell.is_started else []
        return [*self.program, "--config", self.settings[cell.setting].config, *given, *resume]

    def _collect(self, todo: Sequence[Cell], *, stopping: bool) -> None:
        """Take note of the processes that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            os.close(job.lock)
            cell, seconds = job.cell, time.monotonic() - job.began
            left = len(todo) + len(self.jobs)
            if cell.is_done:
                self.outcome.finished.append(cell)
                self.display.finished(cell, seconds, 1 - job.at_start, left)
            elif stopping:
                self.display.saved(cell)
            else:
                why = _last_words(cell.log, job.log_start, job.process.returncode)
                write_text(cell.error, why + "\n")
                self.outcome.failed[cell] = why
                self.display.failed(cell, why, left)

    def _pass_on(self, signals: _Signals) -> None:
        for number in range(signals.passed_on, signals.count):
            if number == 0:
                self.display.stopping()
            for job in self.jobs:
                job.process.send_signal(SAVE if number < 2 else KILL)
        signals.passed_on = signals.count

    def _show(self, todo: Sequence[Cell]) -> None:
        running = [
            (job.cell, self._share_done(job.cell), job.at_start, time.monotonic() - job.began) for job in self.jobs
        ]
        waiting = sum(1 - self._share_done(cell) for cell in todo)
        self.display.progress(running, waiting, len(self.slots))

    def _share_done(self, cell: Cell) -> float:
        """Share of a cell's iterations that its journal has seen, 0..1."""
        train = self.configs[cell.setting, cell.method].train
        record = _last_record(cell.folder / "metrics.jsonl")
        if record is None:
            return 0.0
        stages = 2 if train.baseline else 1
        before = 1 if train.baseline and record.get("stage", record.get("split")) == "after" else 0
        return min(1.0, (before + record.get("iteration", 0) / train.iterations) / stages)


class _Signals:
    """Counts the signals that ask us to stop."""

    def __init__(self) -> None:
        self.count = self.passed_on = 0

    def __enter__(self) -> _Signals:
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        wanted = (signal.SIGINT, signal.SIGTERM, *([] if nohup else [signal.SIGHUP]))
        # a handler of ours also gives the processes the default one, where a shell has us ignore Ctrl-C
        self.before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _tail(path: Path, start: int = 0) -> list[str]:
    """Whole lines at the end of a file, from a byte on."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _last_record(path: Path) -> dict | None:
    """The last whole line of a journal."""
    for line in reversed(_tail(path)):
        try:
            record = json.loads(line)
        except ValueError:  # cut short: it is being written, or longer than the tail
            continue
        if isinstance(record, dict):
            return record
    return None


def _last_words(log: Path, start: int, code: int) -> str:
    """Why a process ended, in one line: its error, else the last thing it wrote."""
    lines = [line.strip() for line in _tail(log, start) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last words: {said}"
    return said if code else f"it ended without result.json; last words: {said}"
