"""`cegate train`: adapt a frozen backbone to a source domain and report what it does on unseen target domains."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cegate import cli, configfile
from cegate.errors import ConfigError

USAGE = cli.Usage(
    prog="cegate train",
    description="Adapt a frozen vision transformer to a source domain with gated modules and report mIoU on unseen "
    "targets. Without --config the quick start runs: generated scenes, two CPU cores, a few minutes. "
    "Every key of the configuration is an option: --train.iterations 500, --data.targets.<name>.root DIR, "
    "or a whole mapping as YAML: --data.targets '{north: {root: DIR}}'.",
    options=(
        cli.Option("config", "YAML file, or the name of a shipped configuration (quickstart).", "FILE"),
        cli.Option("resume", "Go on from checkpoints/last.pt of the run folder."),
        cli.Option("overwrite", "Start again; an existing run folder is moved aside first."),
        cli.Option("dry_run", "Check configuration, data and model, describe the run, and stop."),
        cli.Option("print_config", "Print the resolved configuration and stop."),
    ),
    sections=tuple(configfile.SECTIONS),
    bare="config",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, train, print the table."""
    options = cli.parse_options(argv, USAGE)
    config = cli.parse_config(argv, USAGE, base=options["config"] or "quickstart", training=True)
    if options["print_config"]:
        print(configfile.to_yaml(config), end="")
        return cli.GOOD
    if options["resume"] and options["overwrite"]:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    from cegate.engine import trainer

    if options["dry_run"]:
        print(trainer.describe(config))
        return cli.GOOD
    result = trainer.train(config, resume=options["resume"], overwrite=options["overwrite"])
    if result is not None:
        result.print()
    return cli.GOOD


if __name__ == "__main__":
    sys.exit(main())
