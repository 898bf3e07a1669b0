"""`cegate inspect`: what a run or an adapter holds, or which backends run here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cegate import cli
from cegate.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

USAGE = cli.Usage(
    prog="cegate inspect",
    description="Show what the gate of a run chose and what came of it, what an adapter holds, or which backends run "
    "here. --report writes what an issue should say of versions, machine and backends, and of a run if --run is given.",
    options=(
        cli.Option("run", "Run folder.", "DIR"),
        cli.Option("adapter", "Adapter folder.", "DIR"),
        cli.Option("backends", "Show which operator backends are loaded, and why the others are not."),
        cli.Option("report", "Text to paste into an issue; paths are cut to their last part, user and host left out."),
    ),
    bare="run",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, print."""
    options = cli.parse_options(argv, USAGE)
    given = [name for name in ("run", "adapter", "backends") if options[name]]
    if options["report"] and given in ([], ["run"]):
        from cegate.engine import diagnosis

        print(diagnosis.report(Path(options["run"]) if given else None))
        return cli.GOOD
    if len(given) != 1 or options["report"]:
        raise ConfigError("give one of --run, --adapter and --backends, or --report alone or with --run")
    from rich.console import Console

    from cegate.engine import summary

    console = Console()
    if options["backends"]:
        console.print(summary.backends_table())
    elif options["run"]:
        _print(console, summary.describe_run(Path(options["run"])))
    else:
        _print(console, summary.describe_adapter(Path(options["adapter"])))
    return cli.GOOD


def _print(console: Console, parts: Sequence[Table | str]) -> None:
    for part in parts:
        console.print(part)


if __name__ == "__main__":
    sys.exit(main())
