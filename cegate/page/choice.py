"""What the gate chose, and how stable that is: the parts of the page about sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cegate.page.charts import (
    GREY,
    HeatPanel,
    LineChart,
    Tick,
    heat_panels,
    iteration_ticks,
    level_edges,
    line_chart,
    share_of_mass,
    short,
    top_score,
)
from cegate.page.grids import NOTHING, Grid, GridCell, percent_text, share_cell
from cegate.page.reading import RunFiles
from cegate.page.stability import between_rounds, between_runs, chance_jaccard, mean, share_on

SCORES = {
    "kind": "share of the kind's Fisher mass",
    "layer": "share of the layer's Fisher mass",
    "mean": "Fisher mass per weight",
    "none": "Fisher mass",
}
"""gate.normalize -> what a score is."""
ABOUT_JACCARD = (
    "The Jaccard index of two choices is the share of the sites in either that are in both: 1 for equal choices, 0 for "
    "choices without a common site."
)
MOST_DOTS = 60


@dataclass(frozen=True)
class GatePart:
    """Choices of the main run over time."""

    panels: Sequence[HeatPanel]
    end: int
    """Iterations on the x axis."""
    x_ticks: Sequence[Tick]
    measure: str
    """What a score is; empty where nothing was scored."""
    legend: Sequence[tuple[int, str]]
    """(heat level, its upper end)."""
    marker: int | None
    """Iteration of the model that counts."""
    row_px: int
    label_every: int
    """Height of a row, and which layers are named."""
    summary: str
    mass: Grid | None
    mass_over_time: LineChart | None


@dataclass(frozen=True)
class StabilityPart:
    """How much choices agree."""

    sentences: Sequence[str]
    over_time: LineChart | None
    grids: Sequence[Grid]


def gate_part(run: RunFiles) -> GatePart | None:
    """Heat map and Fisher mass of a run; ``None`` for one that never switched a site on."""
    rounds = run.choices
    if not rounds:
        return None
    end = max(run.reached, rounds[-1].iteration + 1)
    top = top_score(rounds)
    measure = SCORES[run.config.gate.normalize] if top > 0 else ""
    depth = len(_layers(run.sites))
    edges = [short(edge, 2) for edge in level_edges(top)] if top > 0 else []
    shares = [(choice.iteration, share_of_mass(choice)) for choice in rounds]
    return GatePart(
        panels=heat_panels(rounds, run.sites, end, measure),
        end=end,
        x_ticks=iteration_ticks(end),
        measure=measure,
        legend=list(enumerate(edges, 1)),
        marker=run.iteration,
        row_px=14 if depth <= 12 else 10,
        label_every=1 if depth <= 12 else 4,
        summary=_summary(run),
        mass=_mass_grid(run, measure),
        mass_over_time=_mass_chart(run, shares, end),
    )


def _summary(run: RunFiles) -> str:
    rounds = run.choices
    layers = len({site.partition(".")[2] for site in run.sites})
    kinds = _kinds(run.sites)
    last = rounds[-1].active
    per_kind = ", ".join(f"{sum(site.startswith(f'{kind}.') for site in last)} {kind}" for kind in kinds)
    counted = f"{len(rounds)} rounds" if len(rounds) > 1 else "one choice for the whole run"
    return (
        f"{len(run.sites)} sites, {len(kinds)} {'kinds' if len(kinds) > 1 else 'kind'} on {layers} layers; {counted}; "
        f"{len(last)} on at the end: {per_kind}."
    )


def _kinds(sites: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(site.partition(".")[0] for site in sites))


def _layers(sites: Sequence[str]) -> list[str]:
    return sorted({site.partition(".")[2] for site in sites}, key=int)


def _mass_grid(run: RunFiles, measure: str) -> Grid | None:
    """Share of every site, kind and layer: of all Fisher mass where the run recorded it, else scores as compared."""
    measured = [share for choice in run.choices if (share := share_of_mass(choice))]
    scored = [choice.scores for choice in run.choices if choice.scores]
    tables = measured or scored
    if not tables:
        return None
    kinds, layers = _kinds(run.sites), _layers(run.sites)
    means = {site: mean([table.get(site, 0.0) for table in tables]) or 0.0 for site in run.sites}
    last = {site: tables[-1].get(site, 0.0) for site in run.sites}
    top = max(means.values())
    write = percent_text if measured else lambda value: short(value, 2)

    def cell(name: str, sites: Sequence[str], *, shaded: bool = True) -> GridCell:
        of_mean, of_last = sum(means[site] for site in sites), sum(last[site] for site in sites)
        title = f"{name}: mean over rounds {write(of_mean)}, last round {write(of_last)}"
        shade = share_cell(of_mean, top=top).level if shaded else 0
        return GridCell(write(of_mean), shade, title, write(of_last))

    rows = []
    for kind in kinds:
        cells = [cell(f"{kind}.{n}", [f"{kind}.{n}"]) for n in layers]
        rows.append((kind, [*cells, cell(kind, _of(kind, run.sites), shaded=False)]))
    if measured:
        sums = [cell(f"layer {n}", [f"{kind}.{n}" for kind in kinds], shaded=False) for n in layers]
        rows.append(("all kinds", [*sums, cell("all sites", run.sites, shaded=False)]))
        caption, notes = "Share of all Fisher mass of a round, %", ()
    else:
        caption = f"Scores: {measure}"
        notes = ("This run recorded no Fisher mass before normalisation, so kinds cannot be compared by their sums.",)
    caption += "; large: mean over rounds, small: last round"
    return Grid("Fisher mass per kind and layer", caption, "kind / layer", [*layers, "sum"], rows, notes)


def _of(kind: str, sites: Sequence[str]) -> list[str]:
    return [site for site in sites if site.startswith(f"{kind}.")]


def _mass_chart(run: RunFiles, shares: Sequence[tuple[int, Mapping[str, float]]], end: int) -> LineChart | None:
    shares = [(iteration, share) for iteration, share in shares if share]
    if len(shares) < 2:
        return None
    series = []
    for number, kind in enumerate(_kinds(run.sites)):
        members = _of(kind, run.sites)
        series.append((kind, number, [(it, sum(share[site] for site in members)) for it, share in shares], False))
    totals = [sum(choice.mass.values()) for choice in run.choices if choice.mass]
    note = f"All mass of a round: {short(totals[0])} at first, {short(totals[-1])} at the end."
    return line_chart(
        "Share of the Fisher mass by kind, %",
        series,
        width=end,
        low=0.0,
        high=1.0,
        percent=True,
        dots=len(shares) <= MOST_DOTS,
        marker=run.iteration,
        note=note,
    )


def stability_part(runs: Sequence[RunFiles], siblings: Sequence[RunFiles]) -> StabilityPart | None:
    """Agreement of choices over rounds, and between runs.

    Args:
        runs: all runs, the main one first.
        siblings: those that share the main run's settings, itself included.

    Returns:
        The part; ``None`` where the main run never switched a site on.
    """
    main = runs[0]
    if not main.choices:
        return None
    choosing = [run for run in runs if run.choices]
    several = [run for run in choosing if len(run.choices) > 1]
    sentences = ["The choice was made once and held for the whole run."] if len(main.choices) == 1 else []
    grids = []
    if several == [main]:
        sentences.append(_agreement(main))
    elif several:
        grids.append(_agreement_grid(several))
    same = [run for run in siblings if run.choices and run.sites == main.sites]
    if len(same) > 1 or len(main.choices) > 1:
        grids.append(_chosen_grid(same))
    if len(choosing) > 1:
        grids += _matrices(choosing)
    if several or len(choosing) > 1:
        sentences.append(ABOUT_JACCARD)
    return StabilityPart(sentences, _agreement_chart(several) if several else None, grids)


def _chance(run: RunFiles) -> float | None:
    """Jaccard index by chance, where every round chose as many sites."""
    (k, *others) = {len(choice.active) for choice in run.choices}
    return None if others else chance_jaccard(k, len(run.sites))


def _indices(run: RunFiles) -> list[float]:
    """Jaccard index of every choice with the one before; no choice is empty."""
    return [index for index in between_rounds([choice.active for choice in run.choices]) if index is not None]


def _agreement(run: RunFiles) -> str:
    indices, chance = _indices(run), _chance(run)
    k, sites = len(run.choices[0].active), len(run.sites)
    by_chance = f"; two random choices of {k} of {sites} sites would have {chance:.2f}" if chance is not None else ""
    return (
        f"From one round to the next the Jaccard index is {mean(indices):.2f} on average, {min(indices):.2f} at least"
        f"{by_chance}."
    )


def _agreement_grid(runs: Sequence[RunFiles]) -> Grid:
    rows = []
    for run in runs:
        indices, chance = _indices(run), _chance(run)
        values = [mean(indices), min(indices), chance]
        rows.append((run.label, [GridCell(str(len(run.choices))), *map(_index_cell, values)]))
    columns = ["rounds", "mean", "lowest", "by chance"]
    return Grid("Between rounds", "Jaccard index of a choice with the one before", "run", columns, rows)


def _agreement_chart(runs: Sequence[RunFiles]) -> LineChart:
    """Jaccard index of every round with the one before, a line a run."""
    series = []
    for number, run in enumerate(runs):
        iterations = [choice.iteration for choice in run.choices[1:]]
        series.append((run.label, number, list(zip(iterations, _indices(run), strict=True)), False))
    width = max(max(run.reached, run.choices[-1].iteration + 1) for run in runs)
    chance = _chance(runs[0])
    if chance is not None:
        series.append(("by chance", GREY, [(0, chance), (width, chance)], True))
    few = max(len(run.choices) for run in runs) <= MOST_DOTS
    return line_chart("Jaccard index with the round before", series, width=width, low=0.0, high=1.0, dots=few)


def _matrices(runs: Sequence[RunFiles]) -> list[Grid]:
    labels = [run.label for run in runs]
    last, over_rounds = between_runs([{choice.iteration: choice.active for choice in run.choices} for run in runs])

    def grid(title: str, caption: str, matrix: Sequence[Sequence[float | None]]) -> Grid:
        rows = []
        for one, values in zip(labels, matrix, strict=True):
            pairs = zip(labels, values, strict=True)
            rows.append((one, [_index_cell(value, f"{one} and {other}") for other, value in pairs]))
        return Grid(title, caption, "run", labels, rows, upright=True)

    return [
        grid("Between runs, last round", "Jaccard index of the last choices", last),
        grid("Between runs, all rounds", "Jaccard index at the same iteration, mean over rounds", over_rounds),
    ]


def _index_cell(value: float | None, title: str = "") -> GridCell:
    return GridCell(NOTHING if value is None else f"{value:.2f}", share_cell(value).level, title)


def _chosen_grid(runs: Sequence[RunFiles]) -> Grid:
    """How often every site was on, mean over runs; and in how many runs it was on at the end."""
    main = runs[0]
    layers = _layers(main.sites)

    def cell(site: str) -> GridCell:
        shares = [share_on([choice.active for choice in run.choices], site) for run in runs]
        ends = sum(site in run.choices[-1].active for run in runs)
        said = ", ".join(f"{run.label} {percent_text(share)} %" for run, share in zip(runs, shares, strict=True))
        small = f"{ends}/{len(runs)}" if len(runs) > 1 else ""
        return share_cell(mean(shares), title=f"{site}: on in {said} of the rounds", small=small)

    rows = [(kind, [cell(f"{kind}.{n}") for n in layers]) for kind in _kinds(main.sites)]
    caption = "Share of the rounds, %"
    if len(runs) > 1:
        caption += f", mean over {len(runs)} runs; small: runs that had it on at the end"
    return Grid("How often each site was chosen", caption, "kind / layer", layers, rows)
