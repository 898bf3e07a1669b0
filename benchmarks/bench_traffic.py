"""What a step of DINOv2-L at 512 px moves and multiplies: the floor of its kernels, by tensors without memory.

Each operator's tensors are counted once, at rates measured on an H100; that L2 keeps some of them, and that no kernel
reaches a rate in full, is not in it. A launch costs nothing here, as in a recorded step.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import bench_training_step as steps
import pytest
import torch
from bench_host import _triton, without_launches
from models import VIT_L_512
from operator_calls import Traffic
from side_by_side import note
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from cegate import ops
from cegate.backbone.frozen import cast_frozen, reading
from cegate.kernels import _support, frequency_adapter, low_pass, low_rank, residual_norm, sum_squared_gradients

RATE, PEAK = 2.94e12, 754e12
"""Bytes and bfloat16 operations a second of an H100 80GB, measured as a copy of 1 GiB and a product of 8192 x 8192."""
SIZE = VIT_L_512

pytestmark = pytest.mark.skipif(
    not _support.HAS_TRITON or _support.is_interpreted(),
    reason="Triton is not installed, or its interpreter is on",
)


def traffic_of(model: nn.Module, fast: bool) -> Traffic:
    """Of one step; ``fast`` as run.speed=auto makes it."""
    import triton.runtime.jit

    found = Traffic()
    rooms = (_support, frequency_adapter, low_pass, low_rank, residual_norm, sum_squared_gradients)
    with ExitStack() as stack:
        enter = stack.enter_context
        with FakeCopyMode(mode := FakeTensorMode()):
            model = copy.deepcopy(model)
        enter(mode)
        images = torch.empty(SIZE.batch, 3, SIZE.pixels, SIZE.pixels)
        step = steps.make_step(model, images, torch.zeros(SIZE.batch, SIZE.pixels, SIZE.pixels, dtype=torch.int64))
        enter(without_launches())
        enter(patch.object(triton.runtime.jit.JITFunction, "run", lambda *args, **options: launch(*args, **options)))
        enter(patch.object(residual_norm, "pick_backend", _triton))
        for room in rooms:  # tensors that stand for others are no sign of a compiler here
            if hasattr(room, "is_traced"):
                enter(patch.object(room, "is_traced", lambda x: False))
        if fast:
            enter(ops.fused())
            enter(reading(cast_frozen(model.vit, torch.bfloat16)))
        launch = lambda *args, **options: None  # noqa: E731
        step()
        launch = found.launch
        with found:
            step()
    return found


WAYS = {
    "frozen backbone + head": steps.frozen,
    f"{steps.SITES} sites": partial(steps.gated, steps.SITES),
    "all sites": partial(steps.gated, None),
}


@pytest.mark.parametrize("name", WAYS)
def bench_floor_of_a_step(benchmark, monkeypatch, name):
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "SIZE", SIZE)
    model = WAYS[name]()
    for way in ("as written", "run.speed=auto"):
        found = traffic_of(model, way != "as written")
        moved, products = found.bytes.total() / 1e9, found.flop.total() / 1e12
        text = f"{found.milliseconds(RATE, PEAK):.1f} ms: {moved:.0f} GB, {products:.2f} TFLOP"
        note(benchmark.name, way, f"{text}, {found.found.total():,} calls")
    benchmark.pedantic(lambda: None, rounds=1)
