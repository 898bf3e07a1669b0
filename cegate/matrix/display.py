"""What a matrix says while it runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cegate.matrix.cells import Cell


class Display:
    """Tells of every cell that starts or ends, and about how long the rest takes.

    Args:
        console: where to.
        total: cells of the matrix.
        done: cells that were done before.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done, self.failures, self.skips = console, total, done, 0, 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._total = self._bars.add_task("[bold]all cells", total=max(total, 1), completed=done, note="")
        self._tasks: dict[Cell, TaskID] = {}
        self._work, self._seconds = 0.0, 0.0  # cells' worth done by processes that have ended, and their time
        self._left: float | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    @property
    def shares(self) -> list[float]:
        """How far every bar is, 0..1, the one of all cells first."""
        return [task.completed / task.total for task in self._bars.tasks]

    def started(self, cell: Cell, device: str) -> None:
        """A process has started."""
        self._tasks[cell] = self._bars.add_task(f"{cell} on {device}", total=1.0, note="")
        if not self.console.is_terminal:
            self._say(f"started   {cell} on {device}")

    def finished(self, cell: Cell, seconds: float, work: float, left: int) -> None:
        """A cell is complete; ``work`` is the share of it that was done now."""
        self._work += work
        self._seconds += seconds
        self.done += 1
        self._end(cell, f"finished  {cell} in {duration(seconds)}; {{}}", left)

    def failed(self, cell: Cell, why: str, left: int) -> None:
        """A cell has failed."""
        self.failures += 1
        self._end(cell, f"failed    {cell}: {why} (log: {cell.log}); {{}}", left)

    def saved(self, cell: Cell) -> None:
        """A cell has stopped because it was asked to."""
        self._end(cell, f"stopped   {cell}")

    def skipped(self, cell: Cell, why: str, *, done: bool = False) -> None:
        """The cell is not ours to run; another bench runs it, or has ``done`` it."""
        self.done += done
        self.skips += not done
        self._say(f"skipped   {cell}: {why}")

    def stopping(self) -> None:
        """Ctrl-C has come."""
        self._say("stopping: every run finishes its iteration and saves; Ctrl-C again stops them at once")

    def progress(self, running: Sequence[tuple[Cell, float, float, float]], waiting: float, slots: int) -> None:
        """Show how far the running cells are.

        Args:
            running: (cell, share done, share that was done when it started, seconds since) of each.
            waiting: cells' worth that has not started.
            slots: processes at a time.
        """
        work = self._work + sum(share - before for _, share, before, _ in running)
        seconds = self._seconds + sum(taken for *_, taken in running)
        rest = waiting + sum(1 - share for _, share, _, _ in running)
        self._left = seconds / work * rest / min(slots, max(len(running), 1)) if work > 0 else None
        for cell, share, _, taken in running:
            self._bars.update(self._tasks[cell], completed=share, note=duration(taken))
        self._show_all(sum(share for _, share, _, _ in running))

    def _show_all(self, partly: float = 0.0, left: int | None = None) -> None:
        """The bar of all cells ends where there is nothing left to do, whatever became of the cells."""
        ended = self.done + self.failures + self.skips
        self._bars.update(self._total, completed=ended + partly, note=self._standing(left))

    def _standing(self, left: int | None) -> str:
        failures = f", {self.failures} failed" if self.failures else ""
        rest = f", about {duration(self._left)} left" if self._left is not None and left != 0 else ""
        return f"{self.done} of {self.total} done{failures}{rest}"

    def _end(self, cell: Cell, line: str, left: int | None = None) -> None:
        self._bars.remove_task(self._tasks.pop(cell))
        self._show_all(sum(task.completed for task in self._bars.tasks if task.id != self._total), left)
        self._say(line.replace("{}", self._standing(left)))

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time span with two units at most: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
