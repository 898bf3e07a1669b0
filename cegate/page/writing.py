"""Runs -> one HTML file that needs nothing beside it: style, charts and pictures are all inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from cegate import __version__
from cegate.config import Config
from cegate.engine.evaluator import percent
from cegate.errors import CheckpointError
from cegate.page import outcome
from cegate.page.choice import gate_part, stability_part
from cegate.page.features import features_part
from cegate.page.reading import RunFiles
from cegate.page.tiles import tiles_part
from cegate.runfolder import writable_folder, write_text

TEMPLATE = "page.html"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that is taken, before any work is done.

    Raises:
        CheckpointError: it exists, is a folder, or is no .html file.
    """
    if path.is_dir():
        raise CheckpointError(f"--output {path} is a folder; give a file in it, such as {path / 'report.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise CheckpointError(f"--output {path} is no .html file; give a name such as {path.with_suffix('.html')}")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; give another --output, or --overwrite to replace it")
    writable_folder(path.parent, "--output")


def write_page(runs: Sequence[RunFiles], config: Config, path: Path, *, tiles: int, features: bool = False) -> None:
    """Write the page of one or more runs; the file is whole or absent.

    Args:
        runs: the main run, then those it is compared with.
        config: the main run's configuration, perhaps with other data roots or another device, for the pictures.
        path: the .html file; it is replaced.
        tiles: best and worst tiles of a domain, each.
        features: with pictures of the backbone's features.
    """
    write_text(path, render_page(runs, config, tiles=tiles, features=features))


def render_page(runs: Sequence[RunFiles], config: Config, *, tiles: int, features: bool = False) -> str:
    """The HTML of one or more runs, see `write_page`. Equal runs give equal text."""
    main = runs[0]
    parts: dict[str, Any] = {
        "title": main.label,
        "lead": outcome.lead(main),
        "warnings": outcome.warnings(main),
        "tiles": tiles_part(main, config, tiles),
        "features": features_part(main, config) if features else None,
        "measure": outcome.measure_of(main),
        "method": outcome.method_of(main.config),
        "compared": bool(main.before),
        "scores": outcome.score_rows(main),
        "classes": list(outcome.class_rows(main)),
        "facts": outcome.facts(main),
        "runs": outcome.runs_part(runs),
        "gate": gate_part(main),
        "stability": stability_part(runs, outcome.siblings(runs)),
        "curves": outcome.curves(main),
        "restored": outcome.restored(main),
        "confusions": list(outcome.confusions(main)),
        "data": outcome.data_rows(main),
        "environment": outcome.environment(main),
        "config_text": main.config_text,
        "folders": [str(run.folder.path) for run in runs],
        "version": __version__,
    }
    return _environment().get_template(TEMPLATE).render(parts)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": outcome.points}
    return environment
