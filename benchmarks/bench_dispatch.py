"""The C++ operators on the CPU beside PyTorch and their matrix products alone, and one batch of several adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from memory import peak_bytes
from side_by_side import note, side_by_side
from torch import Tensor
from torch.nn.functional import gelu, linear

from cegate import native, ops
from cegate.dispatch import compile_gates
from cegate.kernels.frequency_adapter import frequency_adapter_fft

pytestmark = pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)

WIDTH, RANK = 32, 64
SIZES = {  # batch, side of the grid, channels
    "ViT-T, 1 x 196": (1, 14, 192),
    "ViT-T, 4 x 196": (4, 14, 192),
    "ViT-S, 1 x 256": (1, 16, 384),
    "ViT-S, 4 x 256": (4, 16, 384),
    "ViT-L, 1 x 1024": (1, 32, 1024),
    "ViT-L, 4 x 1024": (4, 32, 1024),
}
ADAPTERS = [0, 0, 1, 1, 2, 2, 3, 3]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).mul_(0.1).requires_grad_() for shape in shapes]


def frequency_tensors(batch: int, side: int, channels: int, stack: tuple[int, ...] = ()) -> list[Tensor]:
    weights = [(3, WIDTH, channels), (3, WIDTH), (3, channels, WIDTH), (3, channels), (3, channels), (3,), ()]
    return leaves((batch, side * side, channels), *((*stack, *shape) for shape in weights))


def semantic_tensors(batch: int, side: int, channels: int, stack: tuple[int, ...] = ()) -> list[Tensor]:
    weights = [(RANK, channels), (channels, RANK), (RANK,), (channels,)]
    return leaves(*[(batch, side * side, channels)] * 2, *((*stack, *shape) for shape in weights))


def spatial_tensors(batch: int, side: int, channels: int, stack: tuple[int, ...] = ()) -> list[Tensor]:
    weights = [(RANK, channels), (channels, RANK)] * 2
    tokens = (batch, side * side)
    return leaves((*tokens, 3 * channels), (*tokens, channels), *((*stack, *shape) for shape in weights))


def frequency(x: Tensor, *weights: Tensor, **options) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    return ops.frequency_adapter(x, (side, side), *weights, **options)


def semantic(
    x: Tensor, base: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor, **options
) -> Tensor:
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    return ops.low_rank(x, down, up, base=base, **biases, activation="gelu", scale=0.1, **options)


def spatial(qkv: Tensor, x: Tensor, *weights: Tensor, **options) -> Tensor:
    # the projection's output is fresh in a network; here a view keeps the same memory from growing a graph
    return ops.low_rank_qv_(qkv.detach(), x, *weights, 1e-3, **options)


def eager_frequency(x: Tensor, *weights: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    return frequency_adapter_fft(x, (side, side), *weights)


def eager_semantic(x: Tensor, base: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor) -> Tensor:
    return base + 0.1 * linear(gelu(linear(x, down, down_bias)), up, up_bias)


def eager_spatial(qkv: Tensor, x: Tensor, down_q: Tensor, up_q: Tensor, down_v: Tensor, up_v: Tensor) -> Tensor:
    q, k, v = qkv.detach().chunk(3, dim=-1)
    return torch.cat([q + 1e-3 * x @ down_q.mT @ up_q.mT, k, v + 1e-3 * x @ down_v.mT @ up_v.mT], dim=-1)


KINDS = {
    "frequency": (frequency_tensors, frequency, eager_frequency, 3 * WIDTH + 3, 1),
    "semantic": (semantic_tensors, semantic, eager_semantic, RANK, 1),
    "spatial": (spatial_tensors, spatial, eager_spatial, 2 * RANK, 2),
}


def products(
    rows: int, channels: int, narrow: int, parts: int, backward: bool, dtype: torch.dtype
) -> Callable[[], None]:
    """The matrix products of a module alone, into memory that is there: down, up, and in backward twice as many."""
    wide, hidden, down, up, dweight, y = (
        torch.randn(shape).to(dtype)
        for shape in ((rows, channels), (rows, narrow), *[(narrow, channels)] * 3, (rows, channels))
    )
    pieces = hidden.chunk(parts, dim=1)
    ups = up.chunk(parts)

    def run() -> None:
        torch.mm(wide, down.mT, out=hidden)
        for piece, weight in zip(pieces, ups, strict=True):
            torch.mm(piece, weight, out=y)
        if not backward:
            return
        torch.mm(hidden, down, out=y)
        torch.mm(hidden.mT, wide, out=dweight)
        for piece, weight, dup in zip(pieces, ups, dweight.chunk(parts), strict=True):
            torch.mm(wide, weight.mT, out=piece)
            torch.mm(piece.mT, wide, out=dup)

    return run


def forward(function: Callable, tensors: list[Tensor], **options) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [function(*tensors, **options)]

    return run


def forward_backward(function: Callable, tensors: list[Tensor], **options) -> Callable[[], list[Tensor]]:
    with torch.no_grad():
        dy = torch.randn_like(function(*tensors, **options))

    def run() -> list[Tensor]:
        y = function(*tensors, **options)
        return [y, *torch.autograd.grad(y, tensors, dy, allow_unused=True)]

    return run


def repeated(run: Callable, times: int) -> Callable:
    """One timed round is several calls: at these sizes a single one is near the clock's noise."""

    def rounds():
        for _ in range(times - 1):
            run()
        return run()

    return rounds


def note_peaks(benchmark, work: Callable[[str], Callable]) -> None:
    """A row of the peak memory of C++ beside that of PyTorch."""
    ours, plain = (peak_bytes(work(backend)) for backend in ("cpp", "torch"))
    note(f"{benchmark.name} peak memory", "torch backend", f"{ours / 1e6:.2f} MB", f"{ours / plain:.3f}", "<= 1")
    benchmark.extra_info["peak bytes"], benchmark.extra_info["peak bytes of torch"] = ours, plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def bench_gated_module(benchmark, kind, size, direction, dtype):
    make, function, eager, narrow, parts = KINDS[kind]
    batch, side, channels = SIZES[size]
    precision = getattr(torch, dtype)
    tensors = [tensor.detach().to(precision).requires_grad_() for tensor in make(batch, side, channels)]
    measure = forward if direction == "forward" else forward_backward
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    (found,) = forward(function, [t.clone() for t in tensors], backend="cpp")()
    (exact,) = forward(eager, [t.float() for t in tensors])()
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)
    ways = {
        "torch backend": measure(function, tensors, backend="torch"),
        "its matrix products": products(
            batch * side * side, channels, narrow, parts, direction != "forward", precision
        ),
    }
    if dtype == "float32":  # the FFT knows no bfloat16 on a CPU
        ways["eager"] = measure(eager, tensors)
    large = channels == 1024
    times = 1 if large else 20
    side_by_side(
        benchmark,
        repeated(measure(function, tensors, backend="cpp"), times),
        {name: repeated(way, times) for name, way in ways.items()},
        rounds=9,
        target={"its matrix products": "<= 1.15"} if large else {"torch backend": "<= 0.5"},
    )
    note_peaks(benchmark, lambda backend: measure(function, tensors, backend=backend))


@pytest.mark.parametrize("size", ["ViT-T, 1 x 196", "ViT-S, 1 x 256"])
@pytest.mark.parametrize("kind", KINDS)
def bench_eight_samples_with_four_adapters(benchmark, kind, size):
    make, function, *_ = KINDS[kind]
    _, side, channels = SIZES[size]
    tensors = make(8, side, channels, (4,))
    count = 1 if kind == "frequency" else 2  # per-sample tensors; the rest is stacked weights
    inputs, stacked = tensors[:count], tensors[count:]
    mine = [[weight[adapter].detach() for weight in stacked] for adapter in range(4)]

    def together(backend: str = "cpp") -> Tensor:
        with torch.no_grad():
            return function(*inputs, *stacked, adapters=ADAPTERS, backend=backend)

    def loop(backend: str = "cpp") -> Tensor:
        with torch.no_grad():
            rows = [
                function(*(t[b : b + 1] for t in inputs), *mine[adapter], backend=backend)
                for b, adapter in enumerate(ADAPTERS)
            ]
            return torch.cat(rows)

    def uniform() -> Tensor:
        with torch.no_grad():
            return function(*inputs, *mine[0], backend="cpp")

    if kind != "spatial":  # in place: two calls would add twice
        torch.testing.assert_close(together(), loop(), rtol=1e-4, atol=1e-5)
    ways = {
        "loop over samples": repeated(loop, 10),
        "loop over samples, torch backend": repeated(partial(loop, "torch"), 10),
        "uniform batch": repeated(uniform, 10),
    }
    target = {"loop over samples": "<= 0.33", "uniform batch": "<= 1.1"}
    side_by_side(benchmark, repeated(together, 10), ways, rounds=9, target=target)
    note_peaks(benchmark, lambda backend: partial(together, backend))


def bench_a_gate_that_is_off(benchmark):
    plan, calls = compile_gates(torch.zeros(8, 3, 24, dtype=torch.int64)), 10_000

    def ask() -> bool:
        return any(plan.is_on(1, 5) for _ in range(calls))

    assert benchmark.pedantic(ask, rounds=7, warmup_rounds=1) is False
    each_us = benchmark.stats.stats.median / calls * 1e6
    note(benchmark.name, "one gate", f"{each_us:.3f} us", "", "< 1 us")
    benchmark.extra_info["us"] = each_us


def bench_compiling_a_plan(benchmark):
    gates = torch.randint(0, 2, (8, 3, 24))
    plan = benchmark(partial(compile_gates, gates, adapters=ADAPTERS))
    assert plan.samples == 8
