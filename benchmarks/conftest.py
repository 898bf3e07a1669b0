"""The table at the end of a benchmark run; ``--results FILE`` also writes it as Markdown with machine and versions."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import ROWS

HEADER = ("benchmark", "way", "median ms or value", "candidate / way", "target")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the table of ratios to this Markdown file")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)] + [f"| {' | '.join(row)} |" for row in ROWS]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    path = config.getoption("--results")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([machine(), "", *lines, ""]))


def machine() -> str:
    """Processor, threads, device and versions in one paragraph."""
    import timm

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}; "
        f"Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}. Ratios are of medians of interleaved rounds in one run."
    )
