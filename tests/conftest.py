"""Every test: seeded, one thread, and ``torch.empty`` full of NaN so that nothing unwritten passes."""

from __future__ import annotations

import os
from pathlib import Path

# the models are tiny: a second thread only waits for the first; set before torch is imported, for subprocesses too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before cegate is imported

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real imagery, weights and reference vectors that are not ours to redistribute; CEGATE_SHARED points elsewhere."""
    folder = Path(os.environ.get("CEGATE_SHARED", SHARED))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CEGATE_SHARED to the folder with data/, weights/ and vectors/")
    return folder
