"""Tables about a run or an adapter, read from its files; no model is built."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from rich.table import Table

from cegate import ops
from cegate.checkpoint import WEIGHTS_FILE, adapter_folder, load_state, read_adapter_config
from cegate.configfile import domain_title
from cegate.engine.evaluator import percent
from cegate.engine.results import best_iteration, records_of
from cegate.errors import CheckpointError
from cegate.figures import STAGES, headline, in_order
from cegate.runfolder import RunFolder
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
    folder = adapter_folder(path)
    config = read_adapter_config(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="np") as file:
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    counts = _weights_per_site(sizes)
    facts = {
        "adapter": str(folder),
        "backbone": f"{config['backbone']}, sha256 {config['backbone_sha256'][:12]}",
        "input": f"bands {config['bands']}, patch {config['patch_size']}, windows of {config['crop']} px",
        "head": f"{config['head']}, {counts.get('head', 0):,} weights",
        "classes": ", ".join(config["classes"]),
        "weights": f"{sum(counts.values()):,}",
        "written by": f"cegate {config.get('cegate_version', 'unknown')}",
    }
    on = [*config["active_sites"], *config["frozen_sites"]]
    return [_facts(facts), "", site_table(in_order(on), counts, on, []), "● on"]


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", value)
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
