"""`cegate tune-lr`: short runs at several learning rates, on what is held out of the source."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cegate import cli, configfile
from cegate.errors import ConfigError, shown

USAGE = cli.Usage(
    prog="cegate tune-lr",
    description="Train shortly at several learning rates and measure what is held out of the source: places in turn, "
    "where its images lie in a folder for each, else data.validation. Targets are never looked at. Keys of the "
    "configuration are options, as for cegate train.",
    options=(
        cli.Option("config", "YAML file, or the name of a shipped configuration.", "FILE"),
        cli.Option("rates", "Peak learning rates, joined by commas; default 1e-4,3e-4,1e-3.", "R,R,..."),
        cli.Option("iterations", "Iterations of each run, with the whole schedule in them; default 500.", "N"),
        cli.Option("output", "Folder of tune_lr.json; default runs/<name>-lr.", "DIR"),
        cli.Option("overwrite", "Replace the numbers of an earlier call."),
    ),
    sections=tuple(configfile.SECTIONS),
    bare="config",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, train shortly, print table and advice."""
    options = cli.parse_options(argv, USAGE)
    if not options["config"]:
        raise ConfigError("--config is missing; give the configuration that a rate is wanted for")
    config = cli.parse_config(argv, USAGE, base=options["config"], training=True)
    rates = _rates(options["rates"] or "1e-4,3e-4,1e-3")
    iterations = options["iterations"] and cli.count(options["iterations"], "iterations", 1)
    from rich.console import Console

    from cegate.engine import tuning

    folder = Path(options["output"] or f"runs/{config.run.name}-lr")
    found = tuning.tune_rate(config, folder, rates=rates, iterations=iterations, overwrite=options["overwrite"])
    console = Console()
    console.print(found.table())
    for line in found.advice():
        console.print(line, highlight=False, soft_wrap=True)
    return cli.GOOD if found.recommended is not None else cli.FAILED


def _rates(text: str) -> list[float]:
    rates = []
    for part in text.split(","):
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(math.nan)
        if not 0 < rates[-1] < math.inf:
            raise ConfigError(f"--rates {shown(part)} is no learning rate; give numbers above 0, such as 1e-4,3e-4")
    return list(dict.fromkeys(rates))


if __name__ == "__main__":
    sys.exit(main())
