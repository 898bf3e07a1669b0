"""What a run says while it works: a bar on a terminal, plain lines elsewhere, and everything in train.log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger("cegate")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} it/s" if task.speed else "", style="dim")


class Reporter:
    """Bar over the iterations of one stage.

    Args:
        console: where to show it.
        title: name of the stage.
        total: iterations of the stage.
        done: iterations done before.
    """

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  mIoU {task.fields[miou]}"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=total, completed=done, loss="–", miou="–")

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def step(self, loss: float) -> None:
        """One iteration is done."""
        self.bar.update(self.task, advance=1, loss=f"{loss:.3f}")

    def evaluated(self, miou: str) -> None:
        """Show the newest mIoU, in percent."""
        self.bar.update(self.task, miou=miou)


@contextmanager
def logging_to(file: Path, console: Console) -> Iterator[None]:
    """Send cegate's log to a file, and to the console: there, lines that a bar shows anyway are left out."""
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_console: logging.Handler = logging.StreamHandler(console.file)
    if console.is_terminal:
        to_console = RichHandler(console=console, show_path=False, show_time=False, show_level=False, highlighter=None)
    to_console.setLevel(logging.INFO if console.is_terminal else logging.DEBUG)
    level = log.level
    log.setLevel(logging.DEBUG)
    for handler in (to_file, to_console):
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in (to_file, to_console):
            log.removeHandler(handler)
            handler.close()
