"""How a run computes: determinism, seeds, memory, Ctrl-C."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Only deterministic torch algorithms inside, where asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_everything(seed: int, purpose: str, iteration: int) -> None:
    """Make every global draw that follows a function of (seed, purpose, iteration)."""
    words = (
        np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), iteration]).generate_state(3, np.uint32).tolist()
    )
    torch.manual_seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002 - the global state is what is meant
    random.seed(words[2])


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once: on a GPU in torch's tensors, on the CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Interrupt:
    """Turns the first Ctrl-C, or SIGTERM as batch systems and containers send it, or SIGHUP as a terminal does that
    closes, into a wish that a loop grants at its next safe point; the second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.process = os.getpid()
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            wanted = [number for number in self.SIGNALS if not (nohup and number == signal.SIGHUP)]
            self.before = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked data worker: it goes on until its parent has saved
            return
        self.asked = True
        self._put_back()
        log.info("finishing this iteration, then saving; Ctrl-C again stops at once")

    def _put_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self._put_back()
