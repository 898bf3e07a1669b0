"""What a run came to: the parts of the page about settings, scores, curves and confusions."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cegate.config import SOURCE_DOMAIN, Config, SetConfig
from cegate.configfile import changed_values, domain_title
from cegate.engine.evaluator import percent
from cegate.engine.results import Record
from cegate.errors import CheckpointError
from cegate.figures import RESTORED, chart_figure, headline, run_charts, svg_uri
from cegate.methods import METHODS
from cegate.metrics import Confusion
from cegate.page.grids import NOTHING, Grid, GridCell, share_cell
from cegate.page.reading import RunFiles, how_to_evaluate, read_domain
from cegate.page.stability import mean, spread
from cegate.runfolder import FREE_ON_RESUME


@dataclass(frozen=True)
class ScoreRow:
    """A score of the stages *frozen* and *gate*, as shares."""

    name: str
    frozen: float | None
    gate: float | None
    note: str = ""

    @property
    def change(self) -> float | None:
        """Gate minus frozen."""
        return None if self.frozen is None or self.gate is None else self.gate - self.frozen


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
    config, gate, sites = run.config, run.config.gate, len(run.sites)
    of = f"{gate.k} of {sites}" if sites else f"{gate.k}"
    words = {
        "fisher": f"the {of} sites with the largest Fisher score, chosen anew every {gate.interval} iterations",
        "random": f"{of} sites drawn at random, anew every {gate.interval} iterations",
        "all": f"every {_listed(config.toolbox.kinds)} site on, all the time",
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
    data, targets = run.config.data, list(run.config.data.targets)
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
    chosen = "the best on validation" if data.validation is not None else "the last one, for there is no validation"
    steps = f"{train.iterations:,} iterations of {data.batch_size} crops of {data.crop} px, seed {config.run.seed}"
    lines = [
        ("Method", describe_method(run)),
        ("Backbone", f"{config.model.backbone}, {config.model.head} head, {len(run.classes)} classes"),
        ("Schedule", steps),
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
    return [
        f"The run has no result.json: it is unfinished, or older than that file. It reached iteration {run.reached} of "
        f"{run.config.train.iterations}; the numbers are those of its journal so far. "
        f"Go on with: cegate train --config {run.folder.config_file} --resume"
    ]


def environment(run: RunFiles) -> list[tuple[str, str]]:
    """(name, value) of env.json."""
    found = {name: value for name, value in run.environment.items() if name != "data"}
    versions, backends = found.pop("versions", {}), found.pop("backends", {})
    lines = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
    lines += [(name.replace("_", " "), "none" if value is None else str(value)) for name, value in found.items()]
    return lines + [(f"backend {name}", str(state)) for name, state in backends.items()]


def data_rows(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """(role, where from, images, fingerprint) of every set of the run."""
    data, recorded = run.config.data, run.environment.get("data", {})
    sets = {"train": data.source, SOURCE_DOMAIN: data.validation, **data.targets, "unlabelled": data.unlabelled}
    roles = {"train": "trained on", SOURCE_DOMAIN: "validation", "unlabelled": "adapted to, without labels"}
    known = {name: recorded.get(name, {}) for name in sets}
    return [
        (
            roles.get(name, f"target {name}"),
            describe_set(item),
            str(known[name].get("images", NOTHING)),
            known[name].get("fingerprint", NOTHING)[:12],
        )
        for name, item in sets.items()
        if item is not None
    ]


# --- scores ---------------------------------------------------------------------------------------------------------


def score_rows(run: RunFiles) -> list[ScoreRow]:
    """The leading score of every domain."""
    rows = []
    for domain in run.domains:
        record = run.after.get(domain) or run.before[domain]
        notes = [] if headline(record)[0] == "mIoU" else [f"mIoU {percent(record['mIoU'])}"]
        notes += [f"without {_listed(record['absent'])}: absent"] if record["absent"] else []
        scores = _score(run.before.get(domain)), _score(run.after.get(domain))
        rows.append(ScoreRow(domain_title(domain), *scores, ", ".join(notes)))
    return rows


def class_rows(run: RunFiles) -> Iterator[tuple[str, list[ScoreRow]]]:
    """(domain, IoU of every class)."""
    for domain in run.domains:
        found = [records.get(domain) for records in (run.before, run.after)]
        names = next(record["per_class"] for record in reversed(found) if record)
        iou = {name: [record and record["per_class"][name]["IoU"] for record in found] for name in names}
        yield domain_title(domain), [ScoreRow(name, *shares) for name, shares in iou.items()]


def measure_of(run: RunFiles) -> str:
    """What the leading scores are."""
    return next((headline(record)[0] for record in {**run.before, **run.after}.values()), "mIoU")


def _score(record: Record | None) -> float | None:
    return record and headline(record)[1]


def points(change: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NOTHING if change is None else f"{100 * change:+z.1f}".replace("-", "−")


# --- several runs ---------------------------------------------------------------------------------------------------


def siblings(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs with the settings of the first, itself included: only seed, name, place or device differ."""
    return [run for run in runs if not differences(runs[0], run)]


def differences(one: RunFiles, other: RunFiles) -> list[str]:
    """Keys that make two runs incomparable."""
    return [key for key in changed_values(one.config, other.config) if key not in (*FREE_ON_RESUME, "run.seed")]


def runs_part(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """A table of all runs, with mean and spread over those of equal settings; ``None`` for a single run.

    A row is (label, whether it is averaged, (score, change) of every domain as text).
    """
    if len(runs) < 2:
        return None
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    same = [run for run in siblings(runs) if run.result]
    table = {
        run.label: [ScoreRow(d, _score(run.before.get(d)), _score(run.after.get(d))) for d in domains] for run in runs
    }

    def text(change: float | None) -> str:
        return "" if change is None else points(change)

    rows = [(run.label, run in same, [(percent(s.gate), text(s.change)) for s in table[run.label]]) for run in runs]
    summary, notes = [], []
    if len(same) > 1:
        columns = list(zip(*(table[run.label] for run in same), strict=True))
        gates, changes = [[s.gate for s in c] for c in columns], [[s.change for s in c] for c in columns]
        pairs = list(zip(gates, changes, strict=True))
        known = [[score for score in column if score is not None] for column in gates]
        ranges = [f"{percent(min(c))} to {percent(max(c))}" if c else NOTHING for c in known]
        summary = [
            ("mean", True, [(percent(mean(a)), text(mean(b))) for a, b in pairs]),
            (
                "standard deviation",
                True,
                [(percent(spread(a)), "" if spread(b) is None else percent(spread(b))) for a, b in pairs],
            ),
            ("lowest to highest", True, [(span, "") for span in ranges]),
        ]
        notes.append(f"Mean and standard deviation (n − 1) over {len(same)} runs of equal settings.")
    for run in runs[1:]:
        if changed := differences(runs[0], run):
            shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
            notes.append(f"{run.label} differs from {runs[0].label} in {shown}, so it is listed and not averaged.")
    notes += [f"{run.label} has no result.json, so it is not averaged." for run in runs if not run.result]
    changed = any(score.change is not None for scores in table.values() for score in scores)
    titles = [domain_title(domain) for domain in domains]
    return {"domains": titles, "rows": rows, "summary": summary, "notes": notes, "changed": changed}


# --- curves and confusion -------------------------------------------------------------------------------------------


def curves(run: RunFiles) -> list[dict[str, str]]:
    """Training loss, and the leading score of every domain."""
    width = max((record["iteration"] for record in run.metrics), default=None)
    charts = run_charts(run.metrics, method_of(run.config))
    drawn = [chart_figure([chart], width=width, marker=run.iteration) for chart in charts]
    return [
        {"src": svg_uri(figure), "alt": f"{chart.title}, over the iterations", "note": ""}
        for chart, figure in zip(charts, drawn, strict=True)
    ]


def restored(run: RunFiles) -> str:
    """data: URI of the run's picture of styled, masked and restored crops; "" where it has none."""
    path = run.folder.figures / RESTORED
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def confusions(run: RunFiles) -> Iterator[tuple[str, Grid | None, str]]:
    """(domain, row-normalised confusion, empty) of every domain, or (domain, ``None``, why there is none)."""
    for domain in run.domains:
        title = domain_title(domain)
        try:
            files = read_domain(run, domain)
        except CheckpointError as error:
            yield title, None, str(error)
            continue
        if files.confusion is None:
            yield title, None, f"There is no {files.folder / 'confusion.npy'}; {how_to_evaluate(run)}"
            continue
        about = ""
        if (scores := files.metrics) is not None:
            (what, value), right = headline(scores), f"{percent(scores['aAcc'])} % of all pixels right"
            about = f"{what} {percent(value)}, {right}, {scores['images']} images"
        yield title, confusion_grid(title, about, files.confusion, run.classes), ""


def confusion_grid(title: str, about: str, matrix: np.ndarray, classes: Sequence[str]) -> Grid:
    """Shares of the pixels of every true class by what they were taken for, in percent.

    Args:
        title: the domain.
        about: its scores.
        matrix: [K, K] int64 pixel counts, rows truth.
        classes: K names.
    """
    totals = dict(zip(classes, matrix.sum(axis=1).tolist(), strict=True))
    rows = []
    for (name, total), counts in zip(totals.items(), matrix.tolist(), strict=True):
        cells = [
            share_cell(count / total, f"{name} taken for {other}: {count:,} of {total:,} pixels")
            if total
            else GridCell(NOTHING, 0, f"no pixel is {name}")
            for other, count in zip(classes, counts, strict=True)
        ]
        rows.append((name, cells))
    absent = Confusion(classes, matrix).scores().absent
    not_true = [name for name, total in totals.items() if not total and name not in absent]
    notes = [f"Absent, neither in truth nor predicted: {', '.join(absent)}."] if absent else []
    notes += [f"Predicted, but not in the truth: {', '.join(not_true)}."] if not_true else []
    return Grid(title, about, "truth \\ predicted", classes, rows, notes, upright=True)
