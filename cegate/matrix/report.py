"""Writes what a matrix has come to: tables in three formats and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cegate.errors import CheckpointError
from cegate.matrix.cells import Cell, find_cells
from cegate.matrix.picture import draw_differences
from cegate.matrix.reading import changed_settings, read_cells
from cegate.matrix.summary import REFERENCE, Matrix
from cegate.matrix.tables import Table, make_tables, to_csv, to_latex, to_markdown
from cegate.runfolder import write_text


@dataclass(frozen=True)
class Report:
    """What was written."""

    files: list[Path]
    tables: list[Table]
    notes: list[str]
    """What the reader must know: cells that failed, are unfinished or could not be read, unequal configurations."""
    problems: list[str]
    """Those notes that are about cells that could not be read."""


def write_report(output: Path) -> Report:
    """Write table.md, table.csv, table.tex and figure.png of every finished cell below a folder, into it.

    Raises:
        CheckpointError: there is no finished cell that can be read.
    """
    cells = find_cells(output)
    results, problems = read_cells(cells)
    failed = [_failure(cell, output) for cell in cells if _has_failed(cell)]
    if not results:
        why = "; ".join([*problems, *failed][:3])
        raise CheckpointError(f"{output} holds no finished cell to make tables of{f': {why}' if why else ''}")
    matrix = Matrix(results)
    unfinished = [str(cell) for cell in cells if not cell.is_done and not _has_failed(cell)]
    notes = [*problems, *failed, *changed_settings(results)]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    if len(matrix.devices()) > 1:
        notes.append(f"Cells ran on {', '.join(matrix.devices())}: compare neither times nor memory between these.")
    if REFERENCE not in matrix.methods:
        notes.append(f"There is no finished cell of {REFERENCE}, so there are no differences.")
    tables = make_tables(matrix)
    figure = output / "figure.png"
    drawn = draw_differences(matrix, figure)
    texts = {
        "table.md": to_markdown(tables, notes, figure=figure.name if drawn else None),
        "table.csv": to_csv(results),
        "table.tex": to_latex(tables),
    }
    for name, text in texts.items():
        write_text(output / name, text)
    return Report([*(output / name for name in texts), *([figure] if drawn else [])], tables, notes, problems)


def _has_failed(cell: Cell) -> bool:
    return cell.error.is_file() and not cell.is_done


def _failure(cell: Cell, output: Path) -> str:
    why = cell.error.read_text(encoding="utf-8").strip()
    return f"{cell} failed: {why} (log: {cell.log.relative_to(output)})"
