"""Tables about a run or an adapter, read from its files; no model is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cegate import ops
from cegate.adapter_folder import find_adapter, read_description, read_weights
from cegate.checkpoint import load_state
from cegate.configfile import domain_title
from cegate.engine.evaluator import percent
from cegate.engine.results import best_iteration, records_of
from cegate.figures import STAGES, headline, in_order
from cegate.runfolder import RunFolder, read_record
from cegate.sites import SiteId


def backends_table() -> Table:
    """What `cegate.ops.backends` reports."""
    table = Table("backend", "state", title="Backends of cegate.ops", title_justify="left")
    for name, state in ops.backends().items():
        table.add_row(name, str(state))
    return table


def describe_run(path: Path) -> list[Table | str]:
    """Facts of a run, and a table of its sites.

    Raises:
        CheckpointError: the folder is no run, or has no checkpoint yet.
    """
    run = RunFolder(path)
    config = run.config()
    state = load_state(run.last)
    counts = _weights_per_site({key: value.numel() for key, value in state.trained.items()})
    rounds, records = run.gates.records, run.metrics.records
    if run.result.is_file():
        best = read_record(run.result).get("iteration")
    else:
        best = best_iteration(records, "after", validated=config.data.validation is not None)
    scores = {domain_title(domain): headline(r) for domain, r in records_of(records, "after", best).items()}
    measure = next((name for name, _ in scores.values()), "mIoU")
    head = counts.get("head", 0)
    facts = {
        "run": str(path),
        "backbone": f"{config.model.backbone}, sha256 {state.backbone_sha256[:12]}",
        "head": f"{config.model.head}, {head:,} weights",
        "classes": ", ".join(state.classes),
        "progress": f"{state.iteration} of {config.train.iterations} iterations, stage {STAGES[state.stage]}",
        "scoring rounds": str(sum(bool(record["scores"]) for record in rounds)),
        f"{measure} (%)": ", ".join(f"{domain} {percent(score)}" for domain, (_, score) in scores.items())
        or "not measured yet",
    }
    sites = in_order(part for part in counts if "." in part)
    on = [*state.active, *state.frozen] if state.stage == "after" else []
    legend = "● on · last score · share of the scoring rounds that chose it"
    return [_facts(facts), "", site_table(sites, counts, on, rounds), legend]


def describe_adapter(path: Path) -> list[Table | str]:
    """Facts of an adapter, and a table of its sites.

    Raises:
        CheckpointError: the folder is no adapter.
    """
    folder = find_adapter(path)
    made, recipe = read_description(folder)
    counts = _weights_per_site({key: value.numel() for key, value in read_weights(folder).items()})
    facts = {
        "adapter": str(folder),
        "backbone": f"{made.backbone}, sha256 {made.backbone_sha256[:12]}",
        "input": f"bands {list(recipe.bands)}, patch {made.patch_size}, windows of {recipe.crop} px",
        "head": f"{made.head}, {counts.get('head', 0):,} weights",
        "classes": ", ".join(recipe.classes),
        "weights": f"{sum(counts.values()):,}",
        "written by": f"cegate {made.cegate_version}",
    }
    return [_facts(facts), "", site_table(in_order(made.plan.on), counts, made.plan.on, []), "● on"]


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", escape(value))
    return table


def _weights_per_site(sizes: Mapping[str, int]) -> dict[str, int]:
    """Site, or other part of the model (``head``), -> number of weights."""
    counts: Counter[str] = Counter()
    for key, size in sizes.items():
        parts = key.split(".")
        counts[".".join(parts[1:-1]) if parts[0] == "toolbox" else parts[0]] += size  # toolbox.<site>.<weight>
    return dict(counts)


def site_table(
    sites: Sequence[str], counts: Mapping[str, int], on: Sequence[str], rounds: Sequence[Mapping[str, Any]]
) -> Table:
    """A row per layer (and stream) and a column per kind: whether the site is on, its last score, how often it was
    chosen."""
    scored = [record for record in rounds if record["scores"]]
    cells = {site: _cell(site, on, scored) for site in sites}
    places = [SiteId(site) for site in sites]
    streams = list(dict.fromkeys(place.stream for place in places))
    kinds = list(dict.fromkeys(place.kind for place in places))
    table = Table(title=f"{len(on)} sites on, {sum(counts[site] for site in on):,} weights", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="left")
    for stream in streams:
        layers = sorted({place.layer for place in places if place.stream == stream})
        for layer in layers:
            row = [cells.get(SiteId.of(kind, layer, stream), "") for kind in kinds]
            table.add_row(f"{layer} {stream or ''}".strip(), *row, end_section=layer == layers[-1])
    return table


def _cell(site: str, on: Sequence[str], scored: Sequence[Mapping[str, Any]]) -> str:
    mark = "[green]●[/]" if site in on else "[dim]·[/]"
    if not scored:
        return mark
    share = sum(site in record["active"] for record in scored) / len(scored)
    return f"{mark} {scored[-1]['scores'].get(site, 0.0):.3f} {100 * share:3.0f} %"
