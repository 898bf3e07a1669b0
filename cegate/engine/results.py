"""The numbers of a run, read back from its journal: which evaluation counts, and the table of both stages."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cegate.config import SOURCE_DOMAIN
from cegate.configfile import domain_title
from cegate.engine.evaluator import percent
from cegate.figures import headline

Record = dict[str, Any]


def stage_title(stage: str, method: str | None = None) -> str:
    """What people read of a stage, of which files say ``before`` or ``after``: *frozen* for frozen backbone + head, and
    for what adapts it *gate*, or the method by its name where another was asked for."""
    return "frozen" if stage == "before" else method or "gate"


def best_iteration(records: Sequence[Record], stage: str, *, validated: bool) -> int | None:
    """The iteration of a stage whose model counts.

    Args:
        records: lines of metrics.jsonl.
        stage: ``before`` or ``after``.
        validated: choose by what leads an evaluation (`headline`: mIoU, or the IoU of a foreground) on the validation
            set (domain ``source``; ties go to the earlier one). Without a validation set the last evaluation counts:
            choosing by target labels would be cheating.
    """
    evaluated = [record for record in records if record["split"] == stage]
    if validated:
        led = [(headline(record)[1], -record["iteration"]) for record in evaluated if record["domain"] == SOURCE_DOMAIN]
        scored = [pair for pair in led if pair[0] is not None]
        return -max(scored)[1] if scored else None
    return max((record["iteration"] for record in evaluated), default=None)


def records_of(records: Sequence[Record], stage: str, iteration: int | None) -> dict[str, Record]:
    """Domain -> the evaluation of a stage at an iteration."""
    chosen = [record for record in records if record["split"] == stage and record["iteration"] == iteration]
    return {record["domain"]: record for record in chosen}


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    path: Path
    """Run folder."""
    before: dict[str, Record]
    """Domain -> evaluation of frozen backbone + head; empty without train.baseline."""
    after: dict[str, Record]
    """Domain -> evaluation of the adapted model."""
    notes: tuple[str, ...] = ()
    """What the reader of the table must know."""
    method: str | None = None
    """``run.method``: what adapted the backbone."""
    iteration: int | None = None
    """That of the model that counts."""

    def table(self) -> str:
        """Per-class IoU in percent of every domain, of both stages, as text."""
        console = Console(file=io.StringIO(), width=100)
        console.print(self.rich_table())
        for line in (*self.notes, f"Run folder: {self.path}"):
            console.print(line, highlight=False, soft_wrap=True)
        return console.file.getvalue().rstrip()

    def next_commands(self) -> list[str]:
        """What one does with a run, a line each."""
        return [
            f"next: cegate report --run {shlex.quote(str(self.path))}",
            f"      cegate predict --run {shlex.quote(str(self.path))} --input IMAGES --output MAPS",
        ]

    def rich_table(self) -> Table:
        """The table with styles, for a console."""
        table = Table(title="IoU (%)", title_justify="left")
        table.add_column("domain", style="bold")
        table.add_column("class")
        titles = (stage_title("before"), stage_title("after", self.method), "change")
        for name in titles if self.before else ("IoU",):
            table.add_column(name, justify="right")
        for domain, record in self.after.items():
            old = self.before.get(domain)
            rows = [(name, _iou(old, name), scores["IoU"]) for name, scores in record["per_class"].items()]
            leads = "mean"
            if headline(record)[0] != "mIoU":  # a foreground, which leads
                rows.reverse()
                leads = rows[0][0]
            rows.append(("mean", old and old["mIoU"], record["mIoU"]))
            for number, (name, was, now) in enumerate(rows):
                last = number == len(rows) - 1
                label = f"{name} (without absent classes)" if last and record["absent"] else name
                cells = [percent(was), percent(now), _change(was, now)] if self.before else [percent(now)]
                style = "bold" if name == leads else None
                table.add_row(domain_title(domain) if number == 0 else "", label, *cells, style=style, end_section=last)
        return table

    def print(self, console: Console | None = None) -> None:
        """Show the table."""
        console = console or Console()
        if not self.after:
            console.print("Nothing was evaluated: the configuration has neither targets nor a validation set.")
        else:
            console.print(self.rich_table())
        for line in (*self.notes, f"Run folder: {self.path}", *self.next_commands()):
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _iou(record: Record | None, name: str) -> float | None:
    return record["per_class"][name]["IoU"] if record else None


def _change(was: float | None, now: float | None) -> str:
    if was is None or now is None:
        return "–"
    points = round(100 * (now - was), 1)
    colour = "green" if points > 0 else "red" if points < 0 else "default"
    return f"[{colour}]{points:+z.1f}[/]"
