"""Chance as a function of numbers: what is drawn for an iteration and a slot is drawn again after any resume, on any
device, by any process."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator of its own for every purpose and every combination of numbers.

    Args:
        seed: of the run, >= 0.
        purpose: what is decided, as in "mask"; other purposes draw independently.
        numbers: iteration, then slot where each sample draws for itself; >= 0.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])
