"""What a run says while it works: a bar on a terminal, plain lines elsewhere, and everything in train.log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

log = logging.getLogger("cegate")

_WIDE = 110  # letters, from which on a long bar leaves room for what it tells


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} it/s" if task.speed else "", style="dim", no_wrap=True)


class _Told(ProgressColumn):
    """What a stage has to say; where room is short it alone gives way."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class Reporter:
    """A bar for each stage of a run, and one for the scoring or evaluation that is under way.

    Args:
        console: where to show it.
        titles: stage -> what it is called, in order; a stage that is over is not among them.
        total: iterations of each.
    """

    def __init__(self, console: Console, titles: Mapping[str, str], total: int) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=28 if console.width >= _WIDE else 8, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Told(),
            _Speed(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )
        fields = {"loss": "–", "scores": "", "text": ""}
        self.stages = {
            name: self.bar.add_task(title, total=total, start=False, **fields) for name, title in titles.items()
        }
        self.aside = self.bar.add_task("", visible=False, text="")

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def begin(self, stage: str, done: int) -> None:
        """Go over to a stage, of which so many iterations are done."""
        self.task = self.stages[stage]
        self.bar.update(self.task, completed=done)
        self.bar.start_task(self.task)

    def step(self, loss: float | None) -> None:
        """One iteration is done; its loss, where that is known yet."""
        self._say(advance=1, loss="–" if loss is None else f"{loss:.3f}")

    def evaluated(self, scores: str) -> None:
        """Show the newest scores, with what they are of."""
        self._say(scores=scores)

    def _say(self, **changes: object) -> None:
        self.bar.update(self.task, **changes)
        fields = self.bar.tasks[self.task].fields
        self.bar.update(self.task, text=f"loss {fields['loss']}  {fields['scores']}")

    @contextmanager
    def meanwhile(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of its own for work that steps wait for; gives what is to be told how much is done."""
        self.bar.reset(self.aside, description=f"  {what}", total=total, visible=True)
        try:
            yield lambda done: self.bar.update(self.aside, completed=done)
        finally:
            self.bar.update(self.aside, visible=False)


@contextmanager
def without_log() -> Iterator[None]:
    """Keep cegate's log from the console, where another process says the same."""
    nowhere = logging.NullHandler()
    log.addHandler(nowhere)
    try:
        yield
    finally:
        log.removeHandler(nowhere)


@contextmanager
def logging_to(file: Path, console: Console) -> Iterator[None]:
    """Send cegate's log to a file, and to the console: there, lines that a bar shows anyway are left out."""
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.handleError = lambda record: None  # a full disk: the checkpoint says so, in one line
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_console: logging.Handler = logging.StreamHandler(console.file)
    if console.is_terminal:
        to_console = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
        to_console.highlighter = NullHighlighter()  # None would be the default one, which colours numbers
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
