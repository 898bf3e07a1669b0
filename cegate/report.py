"""`cegate report`: one HTML page about a run, or about a run among others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cegate import cli
from cegate.errors import ConfigError

TILES = 3

USAGE = cli.Usage(
    prog="cegate report",
    description="Write an HTML page about a run: scores, what the gate chose and how stable that is, curves, "
    "confusions, best and worst tiles. The page is one file that needs no network. Of several runs the first is the "
    "main one; the others join the stability part and a table of mean and spread. Where the data lies elsewhere than "
    "in training: --data.targets.<name>.root DIR.",
    options=(
        cli.Option("run", "Run folders, the main one first.", "DIR", many=True),
        cli.Option("output", "The page; default report.html in the folder of the first run.", "FILE.html"),
        cli.Option("tiles", f"Best and worst tiles of a domain, each; 0 for none, default {TILES}.", "N"),
        cli.Option(
            "features", "Also picture the backbone's features, by class and domain where umap-learn is installed."
        ),
        cli.Option("weights", "Backbone weights, where they lie elsewhere than in training.", "FILE"),
        cli.Option("overwrite", "Replace an existing page."),
    ),
    sections=("data", "run"),
    bare="run",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, read the runs, write the page, print its path."""
    options = cli.parse_options(argv, USAGE)
    if not options["run"]:
        raise ConfigError("--run is missing; give the folder of a run, or of several")
    tiles = TILES if options["tiles"] is None else cli.count(options["tiles"], "tiles", 0, 1000)
    from cegate.page.reading import read_runs
    from cegate.page.writing import check_output, write_page

    folders = [Path(folder) for folder in options["run"]]
    runs = read_runs(folders)
    main_run = runs[0].folder
    config = cli.parse_config(argv, USAGE, base=main_run.config_file, more=main_run.overrides(options["weights"]))
    page = Path(options["output"]) if options["output"] else folders[0] / "report.html"
    check_output(page, overwrite=options["overwrite"])
    write_page(runs, config, page, tiles=tiles, features=options["features"])
    print(page)
    return cli.GOOD


if __name__ == "__main__":
    sys.exit(main())
