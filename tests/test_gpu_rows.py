"""The program that measures a GPU runs where there is none; only its numbers wait."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "benchmarks/gpu_rows.py"


@pytest.fixture(scope="module")
def program():
    """As ``python benchmarks/gpu_rows.py`` runs it, without another start of torch."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_rows", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.main
    sys.path[:] = before


def test_rows_go_to_the_file_one_by_one(program, tmp_path, monkeypatch):
    out = tmp_path / "results.md"
    rows = ["heading", "table", "frequency"]
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", *rows, "--device", "cpu", "--small", "--out", str(out)])
    program()
    lines = out.read_text().splitlines()
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 4  # head, rule, two rows
    assert len(set(cells)) == 1
    assert lines[-2].startswith("| frequency operator, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", "step_18"])
    with pytest.raises(SystemExit, match=r"^no GPU is there; --device cpu --small tries the program without one$"):
        program()
