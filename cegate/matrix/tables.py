"""The tables of a matrix: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cegate.errors import rate_text
from cegate.matrix import published, published_mfnet
from cegate.matrix.cells import RATE
from cegate.matrix.published import Group
from cegate.matrix.reading import CellResult
from cegate.matrix.statistics import Difference, Mean
from cegate.matrix.summary import REFERENCE, Matrix

NONE = "–"
DIFFERENCE = ": difference to gate"
"""End of the titles of tables that are in the files and not on the screen."""
HOW_TO_READ = (
    "Scores are IoU in percent: the mean over classes (mIoU) or, for a foreground class against the background, the "
    "IoU of the foreground, with the mean of the two in brackets. They are means over n seeds ± the half width of "
    "Student's 95 % interval, which one seed does not have. A difference is that of a method to gate in points, with a "
    "95 % interval and a two-sided p value from a bootstrap over seeds and tiles, paired by seed and by tile; where a "
    "seed stands alone they speak of the choice of test tiles only. No p value is corrected for the number of "
    "comparisons. Weights are those that adapt the backbone, without the head; the time of an iteration is the median, "
    "the memory the peak."
)
COLUMNS = (
    *("setting", "method", "seed", "domain", "tiles", "iteration", "headline", "score", "mIoU", "foreground_IoU"),
    *("aAcc", "loss", "trained_parameters", "head_parameters", "step_seconds", "score_seconds", "peak_memory_bytes"),
    "device",
)
"""Of table.csv: one row per cell and domain."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def make_tables(matrix: Matrix) -> list[Table]:
    """The averages, then the scores and differences of each setting."""
    tables = [_average_table(matrix, average) for average in matrix.averages()]
    tables += _rate_tables(matrix)
    for setting in matrix.settings:
        tables += [_score_table(matrix, setting), _difference_table(matrix, setting)]
    return [_without_empty_columns(table) for table in tables if table.rows]


def _average_table(matrix: Matrix, average: Group) -> Table:
    settings = average.settings
    rows = []
    for method in matrix.methods:
        mean = matrix.mean(settings, method)
        if mean is None:
            continue
        gap = matrix.difference(settings, method) if method != REFERENCE else None
        cost, paper = _cost(matrix, settings, method), _paper(average.miou, method)
        rows.append((method, str(mean.seeds), _mean(mean), *_gap(gap), *cost, paper))
    left_out = [method for method in matrix.methods if method not in [row[0] for row in rows]]
    note = f"Mean over {len(settings)} settings, each the mean over its domains: {', '.join(settings)}."
    if left_out:
        note += f" Not here, for no seed of theirs has finished all of them: {', '.join(left_out)}."
    header = ("method", "n", "score", "difference to gate", "p", *_COST, published.LABEL)
    return Table(f"{average.name}: {len(settings)} settings", header, tuple(rows), note)


def _rate_tables(matrix: Matrix) -> list[Table]:
    """Of settings that were run at several learning rates: score on the validation set, then on the targets, with the
    rate of the best validation score marked; targets choose nothing."""
    of: dict[str, dict[float, str]] = {}
    for setting in matrix.settings:
        if found := RATE.fullmatch(setting):
            of.setdefault(found[1], {})[float(found[2])] = setting
    return [_rate_table(matrix, name, dict(sorted(rates.items()))) for name, rates in of.items()]


def _rate_table(matrix: Matrix, name: str, rates: Mapping[float, str]) -> Table:
    rows = []
    for method in matrix.methods:
        ran = {rate: setting for rate, setting in rates.items() if method in matrix.methods_of(setting)}
        validation = {rate: matrix.validation(setting, method) for rate, setting in ran.items()}
        scored = {rate: mean.value for rate, mean in validation.items() if mean is not None}
        best = max(scored, key=scored.__getitem__, default=None)
        for rate, setting in ran.items():
            mark = "best" if rate == best else ""
            seeds = str(len(matrix.of_setting(setting, method)))
            target = _mean(matrix.mean([setting], method))
            rows.append((method, rate_text(rate), seeds, _mean(validation[rate]), mark, target))
    note = (
        "The best rate is that of the highest validation score, a held-out part of the source; such parts prefer rates "
        "that are too high for other places."
    )
    return Table(f"{name}: learning rates", ("method", "lr", "n", "validation", "chosen", "targets"), tuple(rows), note)


def _score_table(matrix: Matrix, setting: str) -> Table:
    domains = matrix.domains_of(setting)
    label, paper = _published(matrix, setting)
    rows = []
    for method in matrix.methods_of(setting):
        scores = [_score(matrix, setting, method, domain) for domain in domains]
        average = _mean(matrix.mean([setting], method)) if len(domains) > 1 else NONE
        validation = _mean(matrix.validation(setting, method))
        seeds = str(len(matrix.of_setting(setting, method)))
        cost = _cost(matrix, [setting], method)
        rows.append((method, seeds, *scores, average, validation, *cost, _paper(paper, method)))
    header = ("method", "n", *domains, "average", "validation", *_COST, label)
    tiles = ", ".join(f"{domain} {matrix.tiles_of(setting, domain)}" for domain in domains)
    headline = "foreground IoU (two-class mean)" if matrix.is_binary(setting) else "mIoU"
    return Table(setting, header, tuple(rows), f"{headline}; test tiles: {tiles}.")


def _published(matrix: Matrix, setting: str) -> tuple[str, Mapping[str, float]]:
    """Title of the column of a paper's figures, and method -> figure."""
    if setting in published_mfnet.SETTINGS:
        return published_mfnet.column(setting, matrix.of_setting(setting)[0].config.model.backbone)
    return published.LABEL, published.SETTINGS.get(setting, {})


def _notes_on_papers(tables: Iterable[Table]) -> list[str]:
    """What a reader must know of the columns of papers that there are."""
    titles = [title for table in tables for title in table.header]
    papers = (published, published_mfnet)
    return [paper.NOTE for paper in papers if any(title.startswith(paper.LABEL) for title in titles)]


def _difference_table(matrix: Matrix, setting: str) -> Table:
    domains = matrix.domains_of(setting)
    columns = [*domains, None] if len(domains) > 1 else domains
    rows = []
    for method in matrix.methods_of(setting):
        gaps = [matrix.difference([setting], method, domain) for domain in columns]
        if method != REFERENCE and gaps[0] is not None:
            rows.append((method, str(gaps[0].seeds), *(text for gap in gaps for text in _gap(gap))))
    header = ("method", "n", *(text for domain in columns for text in (domain or "average", "p")))
    return Table(f"{setting}{DIFFERENCE}", header, tuple(rows))


_COST = ("weights (M)", "iteration (s)", "memory (GiB)")


def _cost(matrix: Matrix, settings: Sequence[str], method: str) -> tuple[str, str, str]:
    weights, seconds, peak = matrix.costs(settings, method)
    return (
        f"{weights / 1e6:.2f}",
        NONE if seconds is None else f"{seconds:.3g}",
        NONE if peak is None else f"{peak / 2**30:.2f}",
    )


def _score(matrix: Matrix, setting: str, method: str, domain: str) -> str:
    text = _mean(matrix.mean([setting], method, domain))
    if matrix.is_binary(setting):
        text += f" ({100 * matrix.two_class_mean(setting, method, domain).value:.1f})"
    return text


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return NONE
    return f"{100 * mean.value:.1f}" + ("" if mean.high is None else f" ± {100 * (mean.high - mean.value):.1f}")


def _gap(gap: Difference | None) -> tuple[str, str]:
    """Difference with its interval, and p."""
    if gap is None:
        return NONE, NONE
    interval = "" if gap.low is None else f" [{_signed(gap.low)}, {_signed(gap.high)}]"
    interval += " tiles only" if interval and gap.seeds == 1 else ""
    return _signed(gap.value) + interval, NONE if gap.p is None else "< 0.001" if gap.p < 0.001 else f"{gap.p:.3f}"


def _signed(share: float) -> str:
    return f"{100 * share:+z.2f}".replace("-", "−")


def _paper(numbers: Mapping[str, float], method: str) -> str:
    return f"{numbers[method]:.1f}" if method in numbers else NONE


def _without_empty_columns(table: Table) -> Table:
    kept = [index for index in range(len(table.header)) if any(row[index] != NONE for row in table.rows)]
    return replace(
        table,
        header=tuple(table.header[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


# --- formats --------------------------------------------------------------------------------------------------------


def to_markdown(tables: Iterable[Table], notes: Sequence[str], *, figure: str | None = None) -> str:
    """A page with every table.

    Args:
        tables: in order.
        notes: what the reader must know, a line each.
        figure: name of a picture beside the page.
    """
    tables = list(tables)
    lines = ["# Methods compared", "", HOW_TO_READ, ""]
    lines += [f"* {note}" for note in notes] + [""] * bool(notes)
    for note in _notes_on_papers(tables):
        lines += [note, ""]
    if figure is not None:
        lines += [f"![difference to gate]({figure})", ""]
    return "\n".join([*lines, *map(markdown_table, tables)])


def markdown_table(table: Table) -> str:
    """A table under its title, its columns aligned for reading as text."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (table.header, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        lines.append("| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |")
    return "\n".join([f"## {table.title}", "", *([table.note, ""] if table.note else []), *lines, ""])


def to_latex(tables: Iterable[Table]) -> str:
    """The tables in the manner of booktabs, for \\input; ``\\usepackage{booktabs}`` is all they need."""
    tables = list(tables)
    notes = [HOW_TO_READ, *_notes_on_papers(tables)]
    parts = ["% made by cegate bench; needs \\usepackage{booktabs}", *(f"% {note}" for note in notes)]
    for table in tables:
        head, *body = (f"{' & '.join(map(_tex, row))} \\\\" for row in (table.header, *table.rows))
        columns, caption = "l" + "r" * (len(table.header) - 1), _tex(f"{table.title}. {table.note}".strip())
        inner = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        tabular = [f"\\begin{{tabular}}{{{columns}}}", *(f"  {line}" for line in inner), r"\end{tabular}"]
        lines = [r"\centering", f"\\caption{{{caption}}}", *tabular]
        parts += ["", r"\begin{table}", *(f"  {line}" for line in lines), r"\end{table}"]
    return "\n".join(parts) + "\n"


_TEX = {"±": r"$\pm$", "−": r"$-$", "–": "--", "<": "$<$", "\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "_%&#$"}


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _TEX)), lambda match: _TEX[match[0]], text)


def to_csv(results: Iterable[CellResult]) -> str:
    """One row per cell and domain; shares 0..1, seconds, bytes; empty where undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        for name, domain in result.domains.items():
            record = domain.record
            values = (
                *(result.cell.setting, result.cell.method, result.cell.seed, name, len(domain.names)),
                *(result.iteration, "foreground_IoU" if domain.binary else "mIoU", domain.score, record["mIoU"]),
                *(domain.foreground, record["aAcc"], record["loss"]),
                *(result.trained_parameters, result.head_parameters, result.step_seconds, result.score_seconds),
                *(result.peak_memory_bytes, result.device),
            )
            writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
