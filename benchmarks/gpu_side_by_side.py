"""The GPU half of the benchmarks: CUDA events, inputs rotated beyond the L2 cache, floors beside times."""

from __future__ import annotations

import functools
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


def with_gradient(make: Callable[[], Sequence[torch.Tensor]], like: int = 0) -> Callable[[], list[torch.Tensor]]:
    """``make``, and last a random gradient of an output shaped as the ``like``-th tensor."""

    def made() -> list[torch.Tensor]:
        tensors = make()
        return [*tensors, torch.rand_like(tensors[like])]

    return made


def forward_backward(op: Callable[..., torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """``op`` and the gradients of all its tensors that want one, under the gradient that is the last argument."""

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *tensors, dy = tensors
        y = op(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]

    return run


def milliseconds(way: Callable[..., Any], *tensors: torch.Tensor) -> float:
    """How long one call keeps the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    way(*tensors)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@functools.cache
def device_rates() -> tuple[float, float]:
    """Bytes a second of a large copy, reads and writes counted, and operations a second of a large bfloat16 product.

    Both are measured here: a floor is what this very device could do at best, not what a data sheet says.
    """
    long = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ways = {"copy of 1 GiB": long.clone, "bf16 product of 8192 x 8192": lambda: square @ square}
    seconds = [statistics.median([milliseconds(way) for _ in range(25)][5:]) / 1e3 for way in ways.values()]
    rates = 2 * long.nbytes / seconds[0], 2 * len(square) ** 3 / seconds[1]
    for name, rate, unit in zip(ways, rates, ("GB/s", "TFLOP/s"), strict=True):
        note("device", name, f"{rate / (1e9 if unit == 'GB/s' else 1e12):.0f} {unit}")
    return rates


def gpu_side_by_side(
    benchmark: Any,
    ways: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Sequence[torch.Tensor]] = ((),),
    *,
    moved_bytes: int | None = None,
    flops: int | None = None,
    targets: Mapping[str, str] | None = None,
    rounds: int = 30,
    warmup: int = 5,
) -> None:
    """Median milliseconds of each way, interleaved; the first is the candidate.

    extra_info and the final table get the ratios candidate / way. With ``moved_bytes`` and ``flops``, which no
    implementation can avoid, they also get the two floors these set on this device and the share of the higher one
    that the candidate reached.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warmup, rounds):
        for name, way in ways.items():
            elapsed = milliseconds(way, *inputs[turn % len(inputs)])
            if turn >= 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = next(iter(medians.values()))
    for name, median in medians.items():
        benchmark.extra_info[f"ratio to {name}"] = round(own / median, 4)
        note(benchmark.name, name, f"{median:.4f}", f"{own / median:.3f}", (targets or {}).get(name, ""))
    if moved_bytes is not None and flops is not None:
        note_floors(benchmark, own, moved_bytes, flops)
    benchmark.pedantic(ways[next(iter(ways))], args=inputs[0], rounds=1)


def note_floors(benchmark: Any, own: float, moved_bytes: int, flops: int) -> None:
    """Rows of the milliseconds that bytes and operations take at least, and of the share of the larger number."""
    bandwidth, speed = device_rates()
    floors = {
        f"byte floor ({moved_bytes / 1e6:.1f} MB)": moved_bytes / bandwidth * 1e3,
        f"flop floor ({flops / 1e9:.2f} GFLOP)": flops / speed * 1e3,
    }
    for name, floor in floors.items():
        note(benchmark.name, name, f"{floor:.4f}", f"{own / floor:.3f}")
    share = max(floors.values()) / own
    note(benchmark.name, "share of the higher floor reached", f"{share:.0%}")
    benchmark.extra_info.update(bytes=moved_bytes, flops=flops, share=round(share, 4))
