"""Tables about a run or an adapter, read from its files; no model is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from rich.table import Table

from cegate import ops
from cegate.checkpoint import WEIGHTS_FILE, adapter_folder, load_state, read_adapter_config
from cegate.config import KINDS
from cegate.engine.evaluator import percent
from cegate.engine.results import best_iteration, records_of
from cegate.errors import CheckpointError
from cegate.runfolder import RunFolder


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
    scores = {domain: percent(record["mIoU"]) for domain, record in records_of(records, "after", best).items()}
    head = counts.get("head", 0)
    facts = {
        "run": str(path),
        "backbone": f"{config.model.backbone}, sha256 {state.backbone_sha256[:12]}",
        "head": f"{config.model.head}, {head:,} weights",
        "classes": ", ".join(state.classes),
        "progress": f"{state.iteration} of {config.train.iterations} iterations, stage {state.stage}",
        "scoring rounds": str(sum(bool(record["scores"]) for record in rounds)),
        "mIoU (%)": ", ".join(f"{domain} {score}" for domain, score in scores.items()) or "not measured yet",
    }
    sites = [part for part in counts if "." in part]
    on = [*state.active, *state.frozen] if state.stage == "after" else []
    legend = "● on · last score · share of the scoring rounds that chose it"
    return [_facts(facts), "", _site_table(sites, counts, on, rounds), legend]


def describe_adapter(path: Path) -> list[Table | str]:
    """Facts of an adapter, and a table of its sites.

    Raises:
        CheckpointError: the folder is no adapter.
    """
    folder = adapter_folder(path)
    config = read_adapter_config(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="np") as file:
            sizes = {key: _product(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
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
    return [_facts(facts), "", _site_table(on, counts, on, []), "● on"]


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
        counts[".".join(parts[1:3]) if parts[0] == "toolbox" else parts[0]] += size
    return dict(counts)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _site_table(
    sites: Sequence[str], counts: Mapping[str, int], on: Sequence[str], rounds: Sequence[Mapping[str, Any]]
) -> Table:
    """A row per layer and a column per kind: whether the site is on, its last score, how often it was chosen."""
    kinds = [kind for kind in KINDS if any(site.startswith(f"{kind}.") for site in sites)]
    layers = sorted({int(site.partition(".")[2]) for site in sites})
    scored = [record for record in rounds if record["scores"]]
    trained = sum(counts[site] for site in on)
    table = Table(title=f"{len(on)} sites on, {trained:,} weights", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="left")
    for layer in layers:
        table.add_row(str(layer), *(_cell(f"{kind}.{layer}", on, scored) for kind in kinds))
    return table


def _cell(site: str, on: Sequence[str], scored: Sequence[Mapping[str, Any]]) -> str:
    mark = "[green]●[/]" if site in on else "[dim]·[/]"
    if not scored:
        return mark
    share = sum(site in record["active"] for record in scored) / len(scored)
    return f"{mark} {scored[-1]['scores'].get(site, 0.0):.3f} {100 * share:3.0f} %"
