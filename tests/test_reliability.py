"""What docs/reliability.md points to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", (ROOT / "docs/reliability.md").read_text()))
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert len(named) > 40 and not missing
