"""The program that measures a GPU runs where there is none; only its numbers wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks/gpu_rows.py"
SMALL = ("--device", "cpu", "--small")


def test_rows_go_to_the_file_one_by_one(tmp_path):
    out = tmp_path / "results.md"
    program = [sys.executable, PROGRAM, "heading", "table", "frequency", *SMALL, "--out", out]
    found = subprocess.run(program, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = out.read_text().splitlines()
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 4  # head, rule, two rows
    assert len(set(cells)) == 1
    assert lines[-2].startswith("| frequency operator, ")
