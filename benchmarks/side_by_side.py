"""Two or more ways to the same result, timed in turn within one run."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

ROWS: list[tuple[str, str, str, str, str]] = []
"""(benchmark, way, median ms, ratio to the candidate, target); printed and written at the end of the session."""


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_by_side(
    benchmark: Any,
    candidate: Callable[[], Any],
    others: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    target: Mapping[str, str] | None = None,
) -> Any:
    """Time ``candidate`` with pytest-benchmark and, before each of its rounds, every other way; returns its result.

    The medians and the ratios time(candidate) / time(other) go to the benchmark's extra_info and to the final table;
    ``target`` says, per other way, what the ratio should be. Nothing is asserted about time.
    """
    times: dict[str, list[float]] = {name: [] for name in others}

    def time_others() -> None:
        for name, way in others.items():
            times[name].append(seconds_of(way)[0])

    def timed() -> Any:
        return seconds_of(candidate)[1]

    for _ in range(warmup):
        time_others()
        timed()
    times.update({name: [] for name in others})
    result = benchmark.pedantic(timed, setup=time_others, rounds=rounds, iterations=1)
    compare(benchmark, benchmark.stats.stats.median, times, target)
    return result


def in_own_process(benchmark: Any, measure: Callable[[], Mapping[str, list[float]]], target: Mapping[str, str]) -> None:
    """Run ``measure`` in a fresh interpreter, for ways whose speed depends on what ran before them.

    ``measure`` is a function of a module; it gives the seconds of each way's rounds, the candidate first, and checks
    the result itself.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        times = dict(benchmark.pedantic(lambda: fresh.submit(measure).result(), rounds=1))
    compare(benchmark, statistics.median(times.pop(next(iter(times)))), times, target)


def seconds_of(way: Callable[[], Any]) -> tuple[float, Any]:
    """How long one call takes, and what it gives."""
    synchronise()
    start = time.perf_counter()
    result = way()
    synchronise()
    return time.perf_counter() - start, result


def compare(benchmark: Any, own: float, times: Mapping[str, list[float]], target: Mapping[str, str] | None) -> None:
    """Rows of the final table: the candidate's median seconds, every other way's, and their ratios."""
    ROWS.append((benchmark.name, "candidate", f"{own * 1e3:.2f}", "1", ""))
    for name, values in times.items():
        ratio = own / statistics.median(values)
        benchmark.extra_info[f"ratio to {name}"] = round(ratio, 4)
        wanted = (target or {}).get(name, "")
        ROWS.append((benchmark.name, name, f"{statistics.median(values) * 1e3:.2f}", f"{ratio:.3f}", wanted))


def note(label: str, way: str, value: str, ratio: str = "", target: str = "") -> None:
    """Add a row that is no time (peak memory, a reason why something was not measured)."""
    ROWS.append((label, way, value, ratio, target))
