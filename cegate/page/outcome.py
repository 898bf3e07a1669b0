"""What a run came to: the parts of the page about settings, scores, curves and confusions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cegate.config import Config, SetConfig
from cegate.configfile import SOURCE_DOMAIN, changed_values
from cegate.engine.evaluator import percent
from cegate.engine.results import Record
from cegate.errors import CheckpointError
from cegate.methods import METHODS
from cegate.metrics import Confusion
from cegate.page.charts import GREY, LineChart, line_chart
from cegate.page.grids import Grid, GridCell, share_cell
from cegate.page.reading import RunFiles, how_to_evaluate, read_domain
from cegate.page.stability import mean, spread
from cegate.runfolder import FREE_ON_RESUME


@dataclass(frozen=True)
class ScoreRow:
    """A score before and after, in percent; the numbers as text, the shares for the drawing."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None
    """Whether the change is for the better; ``None`` where there is none to speak of."""
    before_share: float | None = None
    after_share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class OutcomePart:
    """Scores of the main run."""

    rows: Sequence[ScoreRow]
    classes: Sequence[tuple[str, Sequence[ScoreRow]]]
    """(domain, IoU of every class)."""
    compared: bool
    """There is a before."""
    method: str
    """Word for what adapts the backbone."""


@dataclass(frozen=True)
class RunRow:
    """One run in the table over runs."""

    label: str
    sibling: bool
    """Takes part in mean and spread."""
    cells: Sequence[tuple[str, str]]
    """(mIoU after, change) of every domain."""


@dataclass(frozen=True)
class RunsPart:
    """Several runs side by side."""

    domains: Sequence[str]
    rows: Sequence[RunRow]
    summary: Sequence[RunRow]
    """Mean and spread."""
    notes: Sequence[str]
    changed: bool
    """Whether a run has a frozen baseline, so that cells have changes."""


# --- what the run was -----------------------------------------------------------------------------------------------


def describe_set(item: SetConfig) -> str:
    """Where a set lies, or how it is made."""
    if item.kind == "generated":
        return f"generated scenes of the climate {item.split}"
    within = item.images if item.kind == "folder" else item.split
    return f"{item.root}/{within}" if within else str(item.root)


def name_set(item: SetConfig) -> str:
    """A set in a few words."""
    if item.kind == "generated":
        return describe_set(item)
    return " ".join(filter(None, (Path(str(item.root)).name, item.split)))


def describe_method(run: RunFiles) -> str:
    """What adapts the backbone, in words."""
    config, sites = run.config, len(run.sites)
    gate, kinds = config.gate, _listed(config.toolbox.kinds)
    of = f"{gate.k} of {sites}" if sites else f"{gate.k}"
    words = {
        "fisher": f"the {of} sites with the largest Fisher score, chosen anew every {gate.interval} iterations",
        "random": f"{of} sites drawn at random, anew every {gate.interval} iterations",
        "all": f"every {kinds} site on, all the time",
        "fixed": f"{len(gate.sites)} fixed sites",
        "none": "no sites, the head alone learns",
    }
    text = words[gate.method]
    if config.refiner.method != "none":
        text = f"{config.refiner.tokens} tokens of rank {config.refiner.rank} on every layer"
    elif config.model.tune == "full":
        text = "the whole backbone learns"
    return f"{method_of(config)}: {text}"


def method_of(config: Config) -> str:
    """The word for what adapts the backbone; gate.method for a mixture that has none."""

    def value(key: str) -> Any:
        return functools.reduce(getattr, key.split("."), config)

    named = (name for name, keys in METHODS.items() if all(value(key) == wanted for key, wanted in keys.items()))
    return config.run.method or next(named, config.gate.method)


def lead(run: RunFiles) -> str:
    """The run in one sentence."""
    data = run.config.data
    targets = list(data.targets)
    tested = f"tested on {_listed(targets)}, which training never saw" if targets else "tested on no other domain"
    if data.unlabelled is not None and run.config.adapt.method != "none":
        tested = f"adapted without labels to {name_set(data.unlabelled)}, tested on {_listed(targets) or 'nothing'}"
    return f"Trained on {name_set(data.source)}; {tested}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """(name, value) of what a reader asks first."""
    config, result = run.config, run.result or {}
    train, data = config.train, config.data
    chosen = "chosen on the held-out source" if data.validation is not None else "the last one, nothing was held out"
    lines = [
        ("Method", describe_method(run)),
        ("Backbone", f"{config.model.backbone}, {config.model.head} head, {len(run.classes)} classes"),
        (
            "Schedule",
            f"{train.iterations:,} iterations of {data.batch_size} crops of {data.crop} px, seed {config.run.seed}",
        ),
        ("Model shown", f"iteration {run.iteration:,}, {chosen}" if run.iteration is not None else "none measured yet"),
    ]
    if result.get("trained_parameters") is not None:
        count, head = result["trained_parameters"], result["head_parameters"]
        lines.append(("Trained weights", f"{count:,} that adapt the backbone, {head:,} in the head"))
    if result.get("step_seconds") is not None:
        scoring = result.get("score_seconds")
        more = f", {scoring:.2f} s a scoring round" if scoring is not None else ""
        lines.append(("Time", f"{result['step_seconds']:.2f} s an iteration{more} (medians)"))
    if result.get("peak_memory_bytes") is not None:
        lines.append(("Peak memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return lines


def warnings(run: RunFiles) -> list[str]:
    """What the reader must know before the numbers."""
    if run.result is not None:
        return []
    path = run.folder.config_file
    return [
        f"The run has no result.json: it is unfinished, or older than that file. It reached iteration {run.reached} of "
        f"{run.config.train.iterations}; the numbers are those of its journal so far. "
        f"Go on with: cegate train --config {path} --resume"
    ]


def environment(run: RunFiles) -> list[tuple[str, str]]:
    """(name, value) of env.json."""
    found = dict(run.environment)
    versions, backends = found.pop("versions", {}), found.pop("backends", {})
    found.pop("data", None)
    lines = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
    lines += [(name.replace("_", " "), _plain(value)) for name, value in found.items()]
    return lines + [(f"backend {name}", str(state)) for name, state in backends.items()]


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def data_rows(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """(role, where from, images, fingerprint) of every set of the run."""
    data, recorded = run.config.data, run.environment.get("data", {})
    sets = {"train": data.source, SOURCE_DOMAIN: data.validation, **data.targets, "unlabelled": data.unlabelled}
    roles = {"train": "trained on", SOURCE_DOMAIN: "held-out source", "unlabelled": "adapted to, without labels"}
    rows = []
    for name, item in sets.items():
        if item is not None:
            known = recorded.get(name, {})
            count, fingerprint = str(known.get("images", "–")), known.get("fingerprint", "–")[:12]
            rows.append((roles.get(name, f"target {name}"), describe_set(item), count, fingerprint))
    return rows


# --- scores ---------------------------------------------------------------------------------------------------------


def domain_title(domain: str) -> str:
    """A domain's name as readers understand it."""
    return "source, held out" if domain == SOURCE_DOMAIN else domain


def outcome_part(run: RunFiles) -> OutcomePart:
    """mIoU and per-class IoU of every domain."""
    rows, classes = [], []
    for domain in run.domains:
        old, new = run.before.get(domain), run.after.get(domain)
        absent = (new or old)["absent"]
        note = f"without {_listed(absent)}: absent" if absent else ""
        rows.append(_score_row(domain_title(domain), _miou(old), _miou(new), note))
        names = (new or old)["per_class"]
        classes.append(
            (domain_title(domain), [_score_row(name, _class_iou(old, name), _class_iou(new, name)) for name in names])
        )
    return OutcomePart(rows, classes, bool(run.before), method_of(run.config))


def _miou(record: Record | None) -> float | None:
    return None if record is None else record["mIoU"]


def _class_iou(record: Record | None, name: str) -> float | None:
    return None if record is None else record["per_class"][name]["IoU"]


def _score_row(name: str, before: float | None, after: float | None, note: str = "") -> ScoreRow:
    change = None if before is None or after is None else after - before
    better = None if change is None or abs(change) < 0.0005 else change > 0
    return ScoreRow(name, percent(before), percent(after), points(change), better, before, after, note)


def points(change: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if change is None else f"{100 * change:+z.1f}".replace("-", "−")


# --- several runs ---------------------------------------------------------------------------------------------------


def siblings(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs with the settings of the first, itself included: only seed, name, place or device differ."""
    return [run for run in runs if not differences(runs[0], run)]


def differences(one: RunFiles, other: RunFiles) -> list[str]:
    """Keys that make two runs incomparable."""
    return [key for key in changed_values(one.config, other.config) if key not in (*FREE_ON_RESUME, "run.seed")]


def runs_part(runs: Sequence[RunFiles]) -> RunsPart | None:
    """A table of all runs, with mean and spread over those of equal settings; ``None`` for a single run."""
    if len(runs) < 2:
        return None
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    same = [run for run in siblings(runs) if run.result]
    scores = {run.label: [_miou(run.after.get(domain)) for domain in domains] for run in runs}
    changes = {run.label: [_change(run, domain) for domain in domains] for run in runs}
    rows = [RunRow(run.label, run in same, _cells(scores[run.label], changes[run.label])) for run in runs]
    summary: list[RunRow] = []
    if len(same) > 1:
        by_domain = list(zip(*(scores[run.label] for run in same), strict=True))
        change_by_domain = list(zip(*(changes[run.label] for run in same), strict=True))
        summary.append(RunRow("mean", True, _cells(map(mean, by_domain), map(mean, change_by_domain))))
        deviations = zip(map(spread, by_domain), map(spread, change_by_domain), strict=True)
        summary.append(
            RunRow("standard deviation", True, [(percent(a), "" if b is None else percent(b)) for a, b in deviations])
        )
        summary.append(RunRow("lowest to highest", True, [(_range(values), "") for values in by_domain]))
    notes = [f"Mean and standard deviation (n − 1) over {len(same)} runs of equal settings."] if summary else []
    for run in runs[1:]:
        if changed := differences(runs[0], run):
            shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
            notes.append(f"{run.label} differs from {runs[0].label} in {shown}, so it is listed and not averaged.")
    notes += [f"{run.label} has no result.json, so it is not averaged." for run in runs if not run.result]
    has_changes = any(change is not None for row in changes.values() for change in row)
    return RunsPart([domain_title(domain) for domain in domains], rows, summary, notes, has_changes)


def _change(run: RunFiles, domain: str) -> float | None:
    old, new = _miou(run.before.get(domain)), _miou(run.after.get(domain))
    return None if old is None or new is None else new - old


def _cells(scores: Sequence[float | None], changes: Sequence[float | None]) -> list[tuple[str, str]]:
    return [
        (percent(score), "" if change is None else points(change))
        for score, change in zip(scores, changes, strict=True)
    ]


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{percent(min(known))} to {percent(max(known))}" if known else "–"


# --- curves ---------------------------------------------------------------------------------------------------------


def curves(run: RunFiles) -> list[LineChart]:
    """Training loss, and mIoU of every domain."""
    records = run.metrics
    if not records:
        return []
    width = max(record["iteration"] for record in records)
    stages = {"before": "frozen backbone + head", "after": method_of(run.config)}

    def loss(stage: str, key: str = "loss") -> list[tuple[int, float]]:
        train = (record for record in records if record["split"] == "train" and record["stage"] == stage)
        return [(record["iteration"], record[key]) for record in train if record.get(key) is not None]

    def miou(stage: str, domain: str) -> list[tuple[int, float]]:
        measured = (record for record in records if record["split"] == stage and record["domain"] == domain)
        return [(record["iteration"], record["mIoU"]) for record in measured if record["mIoU"] is not None]

    losses = [(stages[stage], GREY if stage == "before" else 0, loss(stage), stage == "before") for stage in stages]
    losses.append(("mixed images", 1, loss("after", "mixed"), False))
    domains = list(dict.fromkeys(record["domain"] for record in records if record["split"] in stages))
    scores = []
    for number, domain in enumerate(domains):
        scores.append((domain_title(domain), number, miou("after", domain), False))
        scores.append((f"{domain_title(domain)}, frozen backbone + head", number, miou("before", domain), True))
    charts = []
    if any(values for _, _, values, _ in losses):
        charts.append(line_chart("Training loss", losses, width=width, low=0.0, marker=run.iteration))
    if any(values for _, _, values, _ in scores):
        note = "Dashed: frozen backbone + head." if run.before else ""
        drawn = {"percent": True, "dots": True, "marker": run.iteration}
        charts.append(line_chart("mIoU, %", scores, width=width, note=note, **drawn))
    return charts


# --- confusion ------------------------------------------------------------------------------------------------------


def confusions(run: RunFiles) -> Iterator[tuple[str, Grid | None, str]]:
    """(domain, row-normalised confusion, empty) of every domain, or (domain, ``None``, why there is none)."""
    for domain in run.domains:
        try:
            files = read_domain(run, domain)
        except CheckpointError as error:
            yield domain_title(domain), None, str(error)
            continue
        if files.confusion is None:
            yield domain_title(domain), None, f"There is no {files.folder / 'confusion.npy'}; {how_to_evaluate(run)}"
        else:
            title = domain_title(domain)
            yield title, confusion_grid(title, _about(files.metrics), files.confusion, run.classes), ""


def _about(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return ""
    return (
        f"mIoU {percent(metrics['mIoU'])}, {percent(metrics['aAcc'])} % of all pixels right, {metrics['images']} images"
    )


def confusion_grid(title: str, about: str, matrix: np.ndarray, classes: Sequence[str]) -> Grid:
    """Shares of the pixels of every true class by what they were taken for, in percent.

    Args:
        title: the domain.
        about: its scores.
        matrix: [K, K] int64 pixel counts, rows truth.
        classes: K names.
    """
    truth = matrix.sum(axis=1)
    rows = []
    for name, counts, total in zip(classes, matrix.tolist(), truth.tolist(), strict=True):
        cells = [
            share_cell(count / total, title=f"{name} taken for {other}: {count:,} of {total:,} pixels")
            if total
            else GridCell("–", 0, f"no pixel is {name}")
            for other, count in zip(classes, counts, strict=True)
        ]
        rows.append((name, cells))
    absent = Confusion(classes, matrix).scores().absent
    not_true = [name for name, total in zip(classes, truth, strict=True) if not total and name not in absent]
    notes = []
    if absent:
        notes.append(f"Absent, neither in truth nor predicted: {', '.join(absent)}.")
    if not_true:
        notes.append(f"Predicted, but not in the truth: {', '.join(not_true)}.")
    return Grid(title, about, "truth \\ predicted", classes, rows, notes, upright=True)
