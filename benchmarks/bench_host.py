"""What the host does per operator call and per training step, with every Triton launch left out, so without a GPU.

A GPU waits for this work wherever its own is shorter. Two kinds of rows: microseconds of Python, autograd and
allocation per forward and backward call at sizes so small that products cost nothing; and what one step would launch:
calls of PyTorch's operators that compute something, and Triton launches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest.mock import patch

import bench_training_step as steps
import pytest
import torch
import torch.nn.functional as F
from models import Size, make_batch
from operator_calls import OperatorCalls
from side_by_side import compare, note
from torch import Tensor, nn

from cegate import ops
from cegate.kernels import _support, frequency_adapter, low_pass, low_rank, sum_squared_gradients

ROUNDS, CALLS = 15, 40
TOKENS, WIDTH, RANK = (2, 16), 64, 16
SIZE = Size("vit_large_patch14_dinov2", patch=16, pixels=64, batch=1)

Operator = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.skipif(
    not _support.HAS_TRITON or _support.is_interpreted(),
    reason="Triton is not installed, or its interpreter is on",
)


@contextmanager
def without_launches() -> Iterator[Counter]:
    """Operators run as on a GPU, up to the launch of each Triton kernel; how often each was to be launched."""
    import triton.runtime.jit

    found: Counter = Counter()

    def launch(kernel: object, *_: object, **__: object) -> None:
        found[kernel.__name__] += 1

    rooms = (frequency_adapter, low_pass, low_rank, sum_squared_gradients)
    with patch.object(triton.runtime.jit.JITFunction, "run", launch), patch.object(ops, "_runs_in_cpp", _never):
        patches = [patch.object(room, "pick_backend", _triton) for room in rooms]
        for room in patches:
            room.start()
        try:
            yield found
        finally:
            for room in patches:
                room.stop()


def _never(*_: object, **__: object) -> bool:
    return False


def _triton(*_: object, **__: object) -> str:
    return "triton"


def _leaf(*shape: int) -> Tensor:
    return (0.02 * torch.randn(shape)).requires_grad_()


def adapter() -> tuple[Operator, Operator]:
    """Ours, and the formula as PyTorch runs it."""
    down, up, a, b = _leaf(RANK, WIDTH), _leaf(WIDTH, RANK), _leaf(RANK), _leaf(WIDTH)
    ours = lambda x: ops.low_rank(x, down, up, down_bias=a, up_bias=b, activation="relu", scale=0.1)  # noqa: E731
    return ours, lambda x: 0.1 * F.linear(F.linear(x, down, a).relu(), up, b)


def lora() -> tuple[Operator, Operator]:
    """On the query and value thirds."""
    weights = [_leaf(RANK, WIDTH), _leaf(WIDTH, RANK), _leaf(RANK, WIDTH), _leaf(WIDTH, RANK)]

    def plain(x: Tensor) -> Tensor:
        q, k, v = x.repeat(1, 1, 3).chunk(3, -1)
        q = q + F.linear(F.linear(x, weights[0]), weights[1])
        return torch.cat([q, k, v + F.linear(F.linear(x, weights[2]), weights[3])], -1)

    return lambda x: ops.low_rank_qv_(x.repeat(1, 1, 3), x, *weights), plain


def frequency() -> tuple[Operator, Operator]:
    """Beside the published form, by FFT; autocast leaves an FFT in float32."""
    shapes = [(3, RANK, WIDTH), (3, RANK), (3, WIDTH, RANK), (3, WIDTH), (3, WIDTH), (3,)]
    weights = [*(_leaf(*shape) for shape in shapes), torch.tensor(0.1, requires_grad=True)]
    ours, published = (
        partial(lambda op, x: op(x, (4, 4), *weights), op)
        for op in (ops.frequency_adapter, frequency_adapter.frequency_adapter_fft)
    )
    return ours, published


@pytest.mark.parametrize("make", [adapter, lora, frequency], ids=lambda make: make.__name__)
def bench_host_time_of_an_operator(benchmark, make):
    x, (ours, plain) = torch.randn(*TOKENS, WIDTH, requires_grad=True), make()

    def seconds(way: Operator) -> float:
        """Of this thread, so that other work on the machine is not counted; backward runs in it too."""
        began = time.thread_time()
        for _ in range(CALLS):
            with torch.autocast("cpu", torch.bfloat16):
                y = way(x)
            y.sum().backward()
        return (time.thread_time() - began) / CALLS

    with without_launches() as launched:
        times = [(seconds(ours), seconds(plain)) for _ in range(ROUNDS)]
    assert launched, "nothing was to be launched"
    benchmark.pedantic(seconds, args=(plain,), rounds=1)
    mine, others = zip(*times, strict=True)
    compare(benchmark, median(mine), {"PyTorch's own form": list(others)}, {"PyTorch's own form": "<= 1"})


def _builders() -> dict[str, Callable[[], nn.Module]]:
    return {
        "frozen backbone + head": steps.frozen,
        f"{steps.SITES} sites": partial(steps.gated, steps.SITES),
        "all sites": partial(steps.gated, None),
    }


@pytest.mark.parametrize("name", _builders())
def bench_calls_of_a_step(benchmark, monkeypatch, name):
    """Of DINOv2-L; a forward, backward and optimiser step launches at least so much, whatever the size."""
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "SIZE", SIZE)
    model = _builders()[name]()
    step = steps.make_step(model, *make_batch(SIZE))
    with without_launches() as launched:
        step()
        launched.clear()
        with OperatorCalls() as calls:
            step()
    sites = len(model.toolbox.plan.active)
    assert launched["_low_rank_kernel"] + launched["_mix_kernel"] == sites, "an operator ran without its kernel"
    benchmark.pedantic(step, rounds=1)
    note(benchmark.name, "operators + Triton launches", f"{calls.found.total()} + {launched.total()}")
