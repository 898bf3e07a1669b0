"""The program that measures a GPU runs where there is none; only its numbers wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks/gpu_rows.py"
SMALL = ("--device", "cpu", "--small")


def test_rows_go_to_the_file_one_by_one(tmp_path):
    out = tmp_path / "results.md"
    for row in ("heading", "table", "frequency"):
        found = subprocess.run(
            [sys.executable, PROGRAM, row, *SMALL, "--out", out], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
    lines = out.read_text().splitlines()
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 4  # head, rule, two rows
    assert len(set(cells)) == 1
    assert lines[-2].startswith("| frequency operator, ")


def test_without_a_gpu_it_says_so_in_a_line():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = subprocess.run([sys.executable, PROGRAM, "scoring"], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith("no GPU is there")
