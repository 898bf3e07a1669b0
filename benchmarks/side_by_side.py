"""Two or more ways to the same result, timed in turn within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
            synchronise()
            start = time.perf_counter()
            way()
            synchronise()
            times[name].append(time.perf_counter() - start)

    def timed() -> Any:
        result = candidate()
        synchronise()
        return result

    for _ in range(warmup):
        time_others()
        timed()
    times = {name: [] for name in others}
    result = benchmark.pedantic(timed, setup=time_others, rounds=rounds, iterations=1)
    own = benchmark.stats.stats.median
    label = benchmark.name
    ROWS.append((label, "candidate", f"{own * 1e3:.2f}", "1", ""))
    for name, values in times.items():
        ratio = own / statistics.median(values)
        benchmark.extra_info[f"ratio to {name}"] = round(ratio, 4)
        wanted = (target or {}).get(name, "")
        ROWS.append((label, name, f"{statistics.median(values) * 1e3:.2f}", f"{ratio:.3f}", wanted))
    return result


def note(label: str, way: str, value: str, ratio: str = "", target: str = "") -> None:
    """Add a row that is no time (peak memory, a reason why something was not measured)."""
    ROWS.append((label, way, value, ratio, target))
