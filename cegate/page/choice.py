"""What the gate chose, and how stable that is: the parts of the page about sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cegate.engine.results import Record
from cegate.figures import (
    GREY,
    LINES,
    Chart,
    Curve,
    chart_figure,
    gate_figure,
    site_groups,
    svg_uri,
)
from cegate.page.grids import NOTHING, Grid, GridCell, level_of, percent_text, share_cell
from cegate.page.reading import RunFiles
from cegate.page.stability import between_rounds, between_runs, chance_jaccard, mean, share_on
from cegate.sites import SiteId

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


def gate_part(run: RunFiles) -> dict[str, Any] | None:
    """Picture of the choices of a run, and its Fisher mass; ``None`` for one that never switched a site on."""
    rounds = run.choices
    if not rounds:
        return None
    measure = SCORES[run.config.gate.normalize]
    drawn = {"end": run.end, "marker": run.iteration, "measure": measure}
    groups = site_groups(run.sites)
    layers = len({SiteId(site).layer for site in run.sites})
    last = ", ".join(f"{len({*of.values()} & {*rounds[-1]['active']})} {name}" for name, of in groups.items())
    counted = f"{len(rounds)} rounds" if len(rounds) > 1 else "one choice for the whole run"
    return {
        "summary": "A site is one small module on one layer of the backbone. "
        f"{len(run.sites)} sites on {layers} layers; {counted}; {len(rounds[-1]['active'])} on at the end: {last}.",
        "wide": svg_uri(gate_figure(rounds, run.sites, **drawn)),
        "narrow": svg_uri(gate_figure(rounds, run.sites, columns=1, **drawn)),
        "alt": f"{measure} of every site over the iterations, and when it was on; tables of both follow",
        "mass": _mass_grid(run, measure),
        "mass_over_time": _mass_chart(run),
    }


def share_of_mass(choice: Record) -> Mapping[str, float]:
    """Site -> its share of all Fisher mass of a round; empty where nothing was measured."""
    mass = choice.get("mass", {})
    total = math.fsum(mass.values())
    return {site: value / total for site, value in mass.items()} if total > 0 else {}


def _mass_grid(run: RunFiles, measure: str) -> Grid | None:
    """Share of every site, kind and layer: of all Fisher mass where the run recorded it, else scores as compared."""
    measured = [share for choice in run.choices if (share := share_of_mass(choice))]
    tables = measured or [choice["scores"] for choice in run.choices if choice["scores"]]
    if not tables:
        return None
    means = {site: mean(table.get(site, 0.0) for table in tables) for site in run.sites}
    write = percent_text if measured else "{:.2g}".format

    def cell(name: str, sites: Sequence[str], *, shaded: bool = False) -> GridCell:
        of_mean, of_last = (sum(table.get(site, 0.0) for site in sites) for table in (means, tables[-1]))
        title = f"{name}: mean over rounds {write(of_mean)}, last round {write(of_last)}"
        return GridCell(write(of_mean), level_of(of_mean, max(means.values())) if shaded else 0, title, write(of_last))

    groups, layers = site_groups(run.sites), run.layers
    rows = []
    for name, of in groups.items():
        cells = [cell(of[n], [of[n]], shaded=True) if n in of else GridCell("") for n in layers]
        rows.append((name, [*cells, cell(name, [*of.values()])]))
    notes: tuple[str, ...] = ()
    if measured:
        sums = [cell(f"layer {n}", [of[n] for of in groups.values() if n in of]) for n in layers]
        rows.append(("all kinds", [*sums, cell("all sites", run.sites)]))
    else:
        notes = ("This run recorded no Fisher mass before normalisation, so kinds cannot be compared by their sums.",)
    caption = "Share of all Fisher mass of a round, %" if measured else f"Scores: {measure}"
    caption += "; large: mean over rounds, small: last round"
    return Grid("Fisher mass per kind and layer", caption, "kind / layer", [*layers, "sum"], rows, notes)


def _mass_chart(run: RunFiles) -> dict[str, str] | None:
    shares = [(choice["iteration"], share) for choice in run.choices if (share := share_of_mass(choice))]
    if len(shares) < 2:
        return None
    curves = []
    for (name, of), colour in zip(site_groups(run.sites).items(), LINES * len(run.sites), strict=False):
        points = [(iteration, 100 * sum(share.get(site, 0.0) for site in of.values())) for iteration, share in shares]
        curves.append(Curve(name, points, colour))
    chart = Chart("share of the Fisher mass, %", curves, 0.0, 100.0, _few(shares), ".1f")
    totals = [sum(choice["mass"].values()) for choice in run.choices if choice.get("mass")]
    return {
        "src": _drawn(run, chart, run.iteration),
        "alt": "share of the Fisher mass of each kind over the iterations",
        "note": f"All mass of a round: {totals[0]:.3g} at first, {totals[-1]:.3g} at the end.",
    }


def _drawn(run: RunFiles, chart: Chart, marker: int | None = None) -> str:
    return svg_uri(chart_figure([chart], width=run.end, marker=marker))


def _few(points: Sequence[Any]) -> bool:
    return len(points) <= MOST_DOTS


# --- stability ------------------------------------------------------------------------------------------------------


def stability_part(runs: Sequence[RunFiles], siblings: Sequence[RunFiles]) -> dict[str, Any] | None:
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
        rows = [
            (run.label, [GridCell(str(len(run.choices))), *map(_index_cell, _agreement_values(run))]) for run in several
        ]
        caption = "Jaccard index of a choice with the one before"
        grids.append(Grid("Between rounds", caption, "run", ["rounds", "mean", "lowest", "by chance"], rows))
    same = [run for run in siblings if run.choices and run.sites == main.sites]
    if len(same) > 1 or len(main.choices) > 1:
        grids.append(_chosen_grid(same))
    if len(choosing) > 1:
        grids += _matrices(choosing)
    if several or len(choosing) > 1:
        sentences.append(ABOUT_JACCARD)
    return {"sentences": sentences, "over_time": _agreement_chart(several) if several else None, "grids": grids}


def _indices(run: RunFiles) -> list[float]:
    """Jaccard index of every choice with the one before; no choice is empty."""
    return [index for index in between_rounds([frozenset(r["active"]) for r in run.choices]) if index is not None]


def _agreement_values(run: RunFiles) -> tuple[float | None, float, float | None]:
    """Mean and least Jaccard index of consecutive rounds, and the one by chance where every round chose as many."""
    (k, *others) = {len(choice["active"]) for choice in run.choices}
    return mean(_indices(run)), min(_indices(run)), None if others else chance_jaccard(k, len(run.sites))


def _agreement(run: RunFiles) -> str:
    average, least, chance = _agreement_values(run)
    k, sites = len(run.choices[0]["active"]), len(run.sites)
    by_chance = f"; two random choices of {k} of {sites} sites would have {chance:.2f}" if chance is not None else ""
    return f"From one round to the next the Jaccard index is {average:.2f} on average, {least:.2f} at least{by_chance}."


def _agreement_chart(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Jaccard index of every round with the one before, a line a run."""
    curves = []
    for run, colour in zip(runs, LINES * len(runs), strict=False):
        iterations = [choice["iteration"] for choice in run.choices[1:]]
        curves.append(Curve(run.label, list(zip(iterations, _indices(run), strict=True)), colour))
    longest = max(runs, key=lambda run: run.end)
    if (chance := _agreement_values(runs[0])[-1]) is not None:
        curves.append(Curve("by chance", [(0, chance), (longest.end, chance)], GREY, dashed=True))
    few = _few(max((run.choices for run in runs), key=len))
    chart = Chart("Jaccard index with the round before", curves, 0.0, 1.05, few, ".2f")
    return {"src": _drawn(longest, chart), "alt": f"{chart.title}, over the iterations", "note": ""}


def _matrices(runs: Sequence[RunFiles]) -> list[Grid]:
    labels = [run.label for run in runs]
    last, over_rounds = between_runs([{r["iteration"]: frozenset(r["active"]) for r in run.choices} for run in runs])

    def grid(title: str, caption: str, matrix: Sequence[Sequence[float | None]]) -> Grid:
        rows = [
            (one, [_index_cell(value, f"{one} and {other}") for other, value in zip(labels, values, strict=True)])
            for one, values in zip(labels, matrix, strict=True)
        ]
        return Grid(title, caption, "run", labels, rows, upright=True)

    return [
        grid("Between runs, last round", "Jaccard index of the last choices", last),
        grid("Between runs, all rounds", "Jaccard index at the same iteration, mean over rounds", over_rounds),
    ]


def _index_cell(value: float | None, title: str = "") -> GridCell:
    return GridCell(NOTHING if value is None else f"{value:.2f}", level_of(value), title)


def _chosen_grid(runs: Sequence[RunFiles]) -> Grid:
    """How often every site was on, mean over runs; and in how many runs it was on at the end."""
    main = runs[0]

    def cell(site: str | None) -> GridCell:
        if site is None:
            return GridCell("")
        shares = [share_on([frozenset(choice["active"]) for choice in run.choices], site) for run in runs]
        ends = sum(site in run.choices[-1]["active"] for run in runs)
        said = ", ".join(f"{run.label} {percent_text(share)} %" for run, share in zip(runs, shares, strict=True))
        small = f"{ends}/{len(runs)}" if len(runs) > 1 else ""
        return share_cell(mean(shares), f"{site}: on in {said} of the rounds", small)

    rows = [(name, [cell(of.get(n)) for n in main.layers]) for name, of in site_groups(main.sites).items()]
    caption = "Share of the rounds, %"
    if len(runs) > 1:
        caption += f", mean over {len(runs)} runs; small: runs that had it on at the end"
    return Grid("How often each site was chosen", caption, "kind / layer", main.layers, rows)
