"""`cegate evaluate`: measure a run's model on labelled sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cegate import cli
from cegate.errors import ConfigError

USAGE = cli.Usage(
    prog="cegate evaluate",
    description="Measure a trained run on its validation and target sets, or on others: "
    "--data.targets.<name>.root DIR. The configuration is that of the run.",
    options=(
        cli.Option("run", "Run folder.", "DIR"),
        cli.Option("checkpoint", "best, last, or the path of a checkpoint; default best.", "NAME"),
        cli.Option(
            "without",
            "For a model of two rasters: measure each set once more without its image, without its second raster, or "
            "both ways.",
            "image|second",
            many=True,
        ),
        cli.Option("output", "Also write DIR/<domain>/metrics.json, confusion.npy and per_class.csv.", "DIR"),
        cli.Option("weights", "Backbone weights, where they lie elsewhere than in training.", "FILE"),
        cli.Option("overwrite", "Replace files below --output."),
    ),
    sections=("data", "run", "evaluate"),
    bare="run",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, evaluate, print the table."""
    options = cli.parse_options(argv, USAGE)
    if not options["run"]:
        raise ConfigError("--run is missing; give the folder of a run")
    from rich.console import Console

    from cegate.engine import evaluator
    from cegate.runfolder import RunFolder

    run = RunFolder(Path(options["run"]))
    config = cli.parse_config(argv, USAGE, base=run.config_file, more=run.overrides(options["weights"]))
    output = Path(options["output"]) if options["output"] else None
    evaluations = evaluator.evaluate_run(
        run,
        config,
        checkpoint=options["checkpoint"] or "best",
        without=options["without"] or (),
        output=output,
        overwrite=options["overwrite"],
    )
    Console().print(evaluator.table_of(evaluations))
    return cli.GOOD


if __name__ == "__main__":
    sys.exit(main())
