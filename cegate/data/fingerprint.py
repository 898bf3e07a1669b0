"""What a set of files is told by when a run goes on: names, sizes and parts of the content, as a hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FINGERPRINT = 3
"""Version of the fingerprints that runs record."""
_FACT_BYTES, _FACT_PARTS, _FACT_WHOLE = 2**13, 16, 2**18  # of a file's parts; a small file counts whole


def facts_of(file: Path, version: int) -> list:
    """Name, size and, of the content, all of a small file and parts of a large one; the end is among them, where
    compressed files keep their checksums."""
    size = file.stat().st_size
    if version == 1:
        return [file.name, size]
    last = max(0, size - _FACT_BYTES)
    starts = [max(0, size // 2 - _FACT_BYTES // 2), last]
    if version > 2:
        starts = [last * part // (_FACT_PARTS - 1) for part in range(_FACT_PARTS)]
    with file.open("rb") as content:
        if version > 2 and size <= _FACT_WHOLE:
            return [file.name, size, hashlib.sha256(content.read()).hexdigest()]
        parts = []
        for start in starts:
            content.seek(start)
            parts.append(content.read(_FACT_BYTES))
    return [file.name, size, hashlib.sha256(b"".join(parts)).hexdigest()]


def digest(version: int, *facts: object) -> str:
    prefix = "" if version == 1 else f"{version}:"
    return prefix + hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
