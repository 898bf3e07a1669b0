"""`cegate bench`: train every method on every setting with every seed, and make tables of what comes out."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cegate import cli, configfile
from cegate.cores import usable_cores
from cegate.errors import ConfigError, nearest, rate_text, shown
from cegate.methods import METHODS

if TYPE_CHECKING:
    from cegate.matrix.runner import Outcome

USAGE = cli.Usage(
    prog="cegate bench",
    description="Train every method on every setting with every seed, one process per device, then compare: means and "
    "intervals over seeds, paired differences to gate, costs, the paper's numbers. The same command goes on where it "
    "was stopped; finished cells are never run again. Keys of the configuration hold for all cells: "
    f"--data.roots.potsdam DIR. Methods: {', '.join(METHODS)}. "
    f"Shipped settings: {', '.join(configfile.shipped_configs())}.",
    options=(
        cli.Option("settings", "Names of shipped configurations, or YAML files.", "S", many=True),
        cli.Option("methods", "What adapts the backbone, in one word each.", "M", many=True),
        cli.Option("seeds", "Seeds; default 0 1 2.", "N", many=True),
        cli.Option(
            "lrs",
            "Learning rates as one more axis: each setting at each rate, and a table that marks the rate with the best "
            "score on data.validation; default the setting's own.",
            "R",
            many=True,
        ),
        cli.Option("output", "Folder of the matrix: runs in DIR/<setting>/<method>/seed_<k>, tables in DIR.", "DIR"),
        cli.Option(
            "devices",
            "One process on each: cpu, cuda:0, ...; one may be named twice. Default every GPU, or the CPU.",
            "D",
            many=True,
        ),
        cli.Option("jobs", "Processes on the CPU; default its cores divided by --threads.", "N"),
        cli.Option(
            "threads",
            "Threads of each process; default 1 on the CPU, where another number changes sums in their last digits, "
            "and a fair share of the cores beside GPUs.",
            "N",
        ),
        cli.Option("tables_only", "Run nothing; make the tables of every finished cell in --output."),
        cli.Option(
            "dry_run", "Check configurations and run folders, list the cells, and stop; the data are not looked at."
        ),
    ),
    sections=tuple(configfile.SECTIONS),
    bare="settings",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, run the cells, write and print the tables."""
    options = cli.parse_options(argv, USAGE)
    overrides = cli.parse_overrides(argv, USAGE)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise ConfigError(
            "torchrun is not for cegate bench, which takes every GPU of its machine by itself; on several machines "
            "start it once on each with the same --output, and they share the cells"
        )
    if not options["output"]:
        raise ConfigError("--output is missing; give the folder of the matrix")
    output = Path(options["output"])
    if options["tables_only"]:
        if options["dry_run"]:
            raise ConfigError("--tables_only and --dry_run exclude each other; give one")
        return _report(output)
    from cegate.matrix import cells as matrix_cells

    settings = matrix_cells.name_settings(_needed(options, "settings"))
    if options["lrs"]:
        settings = matrix_cells.with_rates(settings, [_rate(text) for text in options["lrs"]])
    methods = _methods(_needed(options, "methods"))
    seeds = [cli.count(text, "seeds", 0) for text in options["seeds"] or ("0", "1", "2")]
    configs = matrix_cells.read_configs(settings, methods, overrides)
    cells = matrix_cells.plan_cells(settings, methods, seeds, output)
    matrix_cells.refuse_other_runs(cells, configs)
    if options["dry_run"]:
        for cell in cells:
            print(f"{cell.state:<11} {cell}")
        return cli.GOOD
    slots, threads = _slots(options)
    from rich.console import Console

    from cegate.matrix.display import Display
    from cegate.matrix.runner import Runner

    todo = [cell for cell in cells if not cell.is_done]
    with Display(Console(stderr=True), len(cells), len(cells) - len(todo)) as display:
        runner = Runner(settings, configs, overrides, slots=slots, threads=threads, display=display)
        outcome = runner.run(todo)
    if outcome.stopped:
        done = sum(cell.is_done for cell in cells)
        raise KeyboardInterrupt(f"stopped with {done} of {len(cells)} cells done; the same command goes on")
    return _finish(outcome, output)


def _finish(outcome: Outcome, output: Path) -> int:
    """Tables; exit code 1 if a cell is missing from them."""
    code = _report(output)
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} cells are being run by another bench; --tables_only adds them later")
    return cli.FAILED if outcome.failed or outcome.elsewhere else code


def _report(output: Path) -> int:
    """Write the tables, show the scores of every setting; exit code 1 if a finished cell could not be read."""
    from cegate.matrix.report import write_report
    from cegate.matrix.tables import DIFFERENCE, markdown_table

    report = write_report(output)
    shown = [table for table in report.tables if not table.title.endswith(DIFFERENCE)]
    print("\n".join([*map(markdown_table, shown), *report.notes]))
    print(f"Written: {', '.join(map(str, report.files))}")
    return cli.FAILED if report.problems else cli.GOOD


def _needed(options: dict[str, Any], name: str) -> list[str]:
    if not options[name]:
        raise ConfigError(f"--{name} is missing; {USAGE.prog} --help lists what is accepted")
    return options[name]


def _methods(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; methods are {', '.join(METHODS)}{nearest(name, METHODS)}")
    return list(dict.fromkeys(names))


def _rate(text: str) -> str:
    """A learning rate, spelt alike in every call: 1e-4 and 0.0001 are one folder."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(f"--lrs {shown(text)} is no learning rate; give numbers above 0, such as 1e-4 3e-4")
    return rate_text(rate)


def _slots(options: dict[str, Any]) -> tuple[list[str], int]:
    """The device of every process at a time, and the threads of each."""
    cores = usable_cores()
    threads = cli.count(options["threads"], "threads", 1, 4096) if options["threads"] else None
    devices = options["devices"] or _all_devices()
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
            raise ConfigError(f"--devices {device} is unknown; use cpu or cuda:<index>")
    if devices != ["cpu"]:
        if options["jobs"]:
            raise ConfigError("--jobs is for the CPU alone; name a device twice for two processes on it")
        on_cpu = "cpu" in devices
        return devices, threads or (1 if on_cpu else max(1, cores // len(devices)))
    jobs = cli.count(options["jobs"], "jobs", 1, 4096) if options["jobs"] else max(1, cores // (threads or 1))
    return ["cpu"] * jobs, threads or 1


def _all_devices() -> list[str]:
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
