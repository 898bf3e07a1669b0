"""A learning rate for the user's data: short runs at several rates, measured on a part of the source that is held out.

Targets are never looked at. The runs leave nothing but their numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cegate.checkpoint import trained_weights
from cegate.compute import Numerics, pick_device, precision_of
from cegate.config import Config
from cegate.configfile import domain_title
from cegate.data.sets import Item, SegmentationSet
from cegate.engine.evaluator import evaluate, percent, windows_of
from cegate.engine.progress import Reporter
from cegate.engine.runtime import deterministic
from cegate.engine.sets import Sets, open_sets, value_range_of
from cegate.engine.stage import Stage
from cegate.engine.step_losses import NotFiniteError
from cegate.engine.team import Team
from cegate.errors import CheckpointError, ConfigError, rate_text
from cegate.figures import headline
from cegate.runfolder import writable_folder, write_json
from cegate.segmenter import Segmenter, build

RATES = (1e-4, 3e-4, 1e-3)
ITERATIONS = 500
MOST_PLACES = 3
CLOSE = 0.01
"""Of a score 0..1: with one seed and few iterations, less says little."""
WARNING = (
    "A held-out part of the source prefers rates that are too high for other places: trained on landslides of one "
    "country and tested in another, the gate had 40.5 IoU at 1e-4, 37.9 at 3e-4 and 33.1 at 1e-3, though the source "
    "preferred a higher one. Where targets differ from the source, take the lowest rate that comes close."
)


@dataclass(frozen=True)
class Trial:
    """What came of a rate."""

    rate: float
    scores: dict[str, float | None]
    """Held-out part -> leading score, 0..1; None where nothing of it had a label, or the loss was not finite."""
    loss: float | None
    """Mean training loss of the last tenth; None where it was not finite."""
    measure: str = "mIoU"

    @property
    def score(self) -> float | None:
        """Mean over the parts."""
        known = list(self.scores.values())
        return None if self.loss is None or not known or None in known else statistics.fmean(known)


@dataclass(frozen=True)
class Tuning:
    """What came of all."""

    trials: tuple[Trial, ...]
    by_place: bool

    @property
    def recommended(self) -> float | None:
        """The lowest rate whose score comes close to the best; None where none was measured."""
        scored = [(trial.rate, trial.score) for trial in self.trials if trial.score is not None]
        best = max((score for _, score in scored), default=None)
        return min((rate for rate, score in scored if score >= best - CLOSE), default=None)

    def table(self) -> Table:
        """Scores in percent, a line for each rate."""
        parts = list(self.trials[0].scores)
        table = Table(title=f"{self.trials[0].measure} (%)", title_justify="left")
        for name in ("lr", "train loss", *parts, *(["mean"] if len(parts) > 1 else [])):
            table.add_column(name, justify="right")
        for trial in self.trials:
            scores = [*trial.scores.values(), *([trial.score] if len(parts) > 1 else [])]
            loss = "not finite" if trial.loss is None else f"{trial.loss:.3f}"
            style = "bold" if trial.rate == self.recommended else None
            table.add_row(rate_text(trial.rate), loss, *map(percent, scores), style=style)
        return table

    def advice(self) -> list[str]:
        """What to do, in lines."""
        rates = [trial.rate for trial in self.trials]
        if self.recommended is None:
            return [f"No rate could be measured; try lower ones, such as --rates {rate_text(min(rates) / 10)}"]
        if not any(trial.score for trial in self.trials):
            return [
                "Nothing was learned at any rate; give more --iterations, or look at the labels with cegate data check"
            ]
        how = "places of the source, each left out of training" if self.by_place else "the held-out part of the source"
        lines = [
            f"Measured on {how}.",
            f"Recommended: --train.lr {rate_text(self.recommended)} (the lowest within {100 * CLOSE:.0f} point of the "
            "best; one seed)",
        ]
        if len(rates) > 1 and self.recommended in (min(rates), max(rates)):
            further = min(rates) / 3 if self.recommended == min(rates) else max(rates) * 3
            lines.append(f"It is the end of what was tried; --rates {rate_text(further)} would look further.")
        return lines if self.by_place else [*lines, WARNING]


def tune_rate(
    config: Config,
    folder: Path,
    *,
    rates: Sequence[float] = RATES,
    iterations: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Tuning:
    """Train shortly at every rate and measure what was held out; ``folder/tune_lr.json`` grows with every rate.

    Args:
        config: a configuration read for training. Where the source has places (folders that its names begin with), up
            to three of them are left out in turn; else ``data.validation`` is measured on.
        folder: the only thing that is written to.
        rates: peak learning rates; they run in increasing order.
        iterations: of each run; default: `ITERATIONS`, or those of the configuration where they are fewer.
        overwrite: numbers of an earlier call may be replaced.
        console: where progress is shown; default: standard error.

    Raises:
        ConfigError: nothing is held out.
        CheckpointError: the folder holds numbers already, or cannot be written to.
        DataError: a set cannot be read.
    """
    file = folder / "tune_lr.json"
    if file.exists() and not overwrite:
        raise CheckpointError(f"{file} exists; give another --output, or --overwrite to replace it")
    count = iterations or min(ITERATIONS, config.train.iterations)
    config, sets = open_sets(replace(shortened(config, count), data=replace(config.data, targets={})))
    divisions = dict(divide(sets))
    if not divisions:
        raise ConfigError(
            "there is nothing to measure on: give data.validation, a held-out part of the source, or a source whose "
            "images lie in a folder for each place"
        )
    writable_folder(folder, "--output")
    device = pick_device(config.run.device)
    network = build(config).to(device)
    network.recipe = replace(network.recipe, value_range=value_range_of(sets.source))
    numerics = Numerics(device, *precision_of(config.run.precision, device))
    initial = {name: value.clone() for name, value in trained_weights(network).items()}
    by_place, trials = sets.validation not in [part.validation for part in divisions.values()], []
    titles = {
        f"{rate} {place}": f"lr {rate_text(rate)}{f', without {place}' if by_place else ''}"
        for rate in sorted(rates)
        for place in divisions
    }
    with deterministic(config.run.deterministic), Reporter(console or Console(stderr=True), titles, count) as reporter:
        for rate in sorted(rates):
            scores: dict[str, float | None] = {}
            losses, measure = [], "mIoU"
            for place, part in divisions.items():
                reporter.begin(f"{rate} {place}", 0)
                tried = replace(config, train=replace(config.train, lr=rate))
                stage = Stage("after", tried, network, part, numerics, Team(), initial)
                losses.append(_run(stage, reporter))
                scores[place] = None
                if losses[-1] is not None:
                    measure, scores[place] = _measure(stage, part.validation, reporter)
            loss = None if None in losses else statistics.fmean(losses)
            trials.append(Trial(rate, scores, loss, measure))
            tuning = Tuning(tuple(trials), by_place)
            write_json(file, _record(tuning, count))
    return tuning


def _run(stage: Stage, reporter: Reporter) -> float | None:
    """Mean loss of the last tenth of the iterations; None as soon as a loss is not finite."""
    losses = []
    try:
        for data in stage.batches():
            if stage.scoring_is_due():
                stage.score()
            losses.append(stage.step(data))
            reporter.step(losses[-1])
    except NotFiniteError:
        return None
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _measure(stage: Stage, held_out: SegmentationSet, reporter: Reporter) -> tuple[str, float | None]:
    network: Segmenter = stage.network
    with reporter.meanwhile(f"evaluating {domain_title(held_out.name)}", len(held_out)) as progress:
        found = evaluate(
            network,
            held_out,
            **windows_of(stage.config),
            mean_classes=stage.config.evaluate.mean_classes,
            precision=stage.numerics.precision,
            progress=progress,
        )
    name, score = headline(found.scores.to_dict())
    reporter.evaluated(f"{name} {percent(score)}")
    return name, score


def _record(tuning: Tuning, iterations: int) -> dict[str, Any]:
    return {
        "iterations": iterations,
        "by_place": tuning.by_place,
        "recommended": tuning.recommended,
        "trials": [{**asdict(trial), "score": trial.score} for trial in tuning.trials],
    }


def shortened(config: Config, iterations: int) -> Config:
    """The configuration with its whole schedule in fewer iterations, whose steps run as they are written: a trial ends
    with its first loss that is not finite, so it looks at every one."""
    train, share = config.train, min(1.0, iterations / config.train.iterations)
    milestones = sorted({max(1, round(share * milestone)) for milestone in train.milestones})
    short = replace(
        train,
        iterations=iterations,
        horizon=None if train.horizon is None else max(iterations, round(share * train.horizon)),
        warmup=int(share * train.warmup),
        milestones=milestones,
    )
    run = replace(config.run, speed="eager")
    return replace(config, run=run, train=short, adapt=replace(config.adapt, warmup=int(share * config.adapt.warmup)))


def divide(sets: Sets) -> Iterator[tuple[str, Sets]]:
    """(what is held out, sets to train and to measure on): place by place, or the validation set."""
    of = [place_of(sets.source.item_name(index)) for index in range(len(sets.source))]
    places = sorted(set(of))
    if len(places) > 1 and None not in places:
        most = sorted(places, key=lambda place: (-of.count(place), place))[:MOST_PLACES]
        for place in sorted(most):
            kept, held = (
                Subset(sets.source, [k for k, name in enumerate(of) if (name == place) == out]) for out in (False, True)
            )
            yield place, replace(sets, source=kept, validation=held)
    elif sets.validation is not None:
        yield domain_title(sets.validation.name), sets


def place_of(name: str) -> str | None:
    """The folder that the name of an image begins with; None where it has none."""
    folder, slash, _ = name.partition("/")
    return folder if slash else None


class Subset:
    """Some images of a set, which is otherwise as it is."""

    def __init__(self, images: SegmentationSet, indices: Sequence[int]) -> None:
        self.images, self.indices = images, list(indices)

    def __getattr__(self, name: str) -> Any:
        if name in ("images", "indices") or name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.indices)

    def item_name(self, index: int) -> str:
        return self.images.item_name(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.images.size(self.indices[index])

    def read(self, index: int, *args: Any, **kwargs: Any) -> Item:
        return self.images.read(self.indices[index], *args, **kwargs)

    def read_label(self, index: int, *args: Any, **kwargs: Any):
        return self.images.read_label(self.indices[index], *args, **kwargs)
