"""The GPU half of the operator benchmarks: CUDA events, inputs rotated beyond the L2 cache, floors beside times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from side_by_side import note

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the speed of the kernels is not measured")


def rotate(make: Callable[[], Sequence[torch.Tensor]]) -> list[Sequence[torch.Tensor]]:
    """As many sets of inputs as it takes to fill the L2 cache twice."""
    sets = [make()]
    size = sum(tensor.nbytes for tensor in sets[0])
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return sets + [make() for _ in range(2 * cache // size)]


def gpu_side_by_side(
    benchmark: Any,
    ways: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Sequence[torch.Tensor]],
    *,
    moved_bytes: int,
    flops: int,
    targets: Mapping[str, str] | None = None,
    rounds: int = 30,
) -> None:
    """Median milliseconds of each way, interleaved; the first is the candidate.

    extra_info and the final table get the ratios candidate / way, and the bytes and operations that no implementation
    can avoid with the rates that the candidate reached.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-5, rounds):  # the first five warm up
        for name, way in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            way(*inputs[turn % len(inputs)])
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(begin.elapsed_time(end))
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = next(iter(medians.values()))
    rates = {"GB/s of the byte floor": moved_bytes / own / 1e6, "TFLOP/s": flops / own / 1e9}
    benchmark.extra_info.update(
        bytes=moved_bytes, flops=flops, **{name: round(rate, 1) for name, rate in rates.items()}
    )
    for name, median in medians.items():
        benchmark.extra_info[f"ratio to {name}"] = round(own / median, 4)
        note(benchmark.name, name, f"{median:.4f}", f"{own / median:.3f}", (targets or {}).get(name, ""))
    for name, rate in rates.items():
        note(benchmark.name, name, f"{rate:.0f}")
    benchmark.pedantic(ways[next(iter(ways))], args=inputs[0], rounds=1)


def forward_backward(op: Callable[..., torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """``op`` and the gradients of all its tensors that want one, under a gradient of ones."""

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        y = op(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    return run
