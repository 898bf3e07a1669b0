"""Compiled equals eager, for the loss and every gradient: inductor over a block that uses every operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from cegate import native, ops
from cegate.kernels._support import HAS_TRITON, is_interpreted

CHANNELS, WIDTH, RANK = 16, 4, 3
GRIDS = [(4, 4), (3, 5)]


def backends_on(device: torch.device) -> list[str]:
    """What runs there in this process; one graph holds them all, since a compilation takes seconds."""
    found = ["torch"]
    if HAS_TRITON and (device.type == "cpu") == is_interpreted():
        found.append("triton")
    return found + ["cpp"] * (native.EXTENSION is not None and device.type == "cpu")


def make_leaves(place: torch.device) -> list[Tensor]:
    """Frozen projection [3C, C]; then what learns: LoRA, a bottleneck adapter, a frequency adapter, its cutoff."""
    maps = [(RANK, CHANNELS), (CHANNELS, RANK)] * 2
    bottleneck = [(RANK, CHANNELS), (CHANNELS, RANK), (RANK,), (CHANNELS,)]
    experts = [(3, WIDTH, CHANNELS), (3, WIDTH), (3, CHANNELS, WIDTH), (3, CHANNELS), (3, CHANNELS), (3,), ()]
    tensors = [torch.randn(shape, device=place).mul_(0.4) for shape in [*maps, *bottleneck, *experts, ()]]
    return [torch.randn(3 * CHANNELS, CHANNELS, device=place), *(tensor.requires_grad_() for tensor in tensors)]


def block(x: Tensor, leaves: list[Tensor], grid: tuple[int, int], scale: float, backend: str) -> Tensor:
    """Every operator, as a transformer block and a Fisher pass use them."""
    frozen, lora, adapter, experts, cutoff = leaves[0], leaves[1:5], leaves[5:9], leaves[9:16], leaves[16]
    qkv = linear(x, frozen)
    ops.low_rank_qv_(qkv, x, *lora, scale, backend=backend)  # in place: its result is qkv itself
    biases = {"down_bias": adapter[2], "up_bias": adapter[3]}
    y = ops.low_rank(
        x, *adapter[:2], base=qkv[..., :CHANNELS], **biases, activation="gelu", scale=scale, backend=backend
    )
    y = y + qkv[..., 2 * CHANNELS :]
    z = ops.frequency_adapter(y, grid, *experts, 0.6, prefix=1, backend=backend)
    smooth = ops.low_pass(z[:, 1:], grid, 0.7, backend=backend)
    if backend != "cpp":  # which knows no learnable cutoff
        z = ops.frequency_adapter(z, grid, *experts, cutoff, prefix=1, backend=backend)
        smooth = ops.low_pass(smooth, grid, cutoff, backend=backend)
    mass = ops.sum_squared_gradients(x, z.detach(), backend="auto" if backend == "cpp" else backend)
    return (z[:, :1] @ smooth.mT).square().mean() + mass.mean()


def losses_of(x: Tensor, leaves: dict[str, list[Tensor]], grid: tuple[int, int], scale: float) -> list[Tensor]:
    return [block(x, own, grid, scale, backend) for backend, own in leaves.items()]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_loss_and_every_gradient_are_those_of_an_eager_call(dynamic, device):
    torch.compiler.reset()
    leaves = {backend: make_leaves(device) for backend in backends_on(device)}
    wanted = [leaf for own in leaves.values() for leaf in own[1:]]
    compiled = torch.compile(losses_of, fullgraph=True, dynamic=dynamic)
    # another grid and another scale: the compiler turns sizes and numbers that change into symbols
    for grid, scale in zip(GRIDS[: 2 if dynamic else 1], (0.3, 0.7), strict=False):
        x = torch.randn(2, 1 + grid[0] * grid[1], CHANNELS, device=device, requires_grad=True)
        found, expected = (function(x, leaves, grid, scale) for function in (compiled, losses_of))
        torch.testing.assert_close(found, expected)
        found, expected = (
            torch.autograd.grad(sum(losses), [x, *wanted], allow_unused=True) for losses in (found, expected)
        )
        unused = [leaves["cpp"][-1]] if "cpp" in leaves else []  # its cutoff
        for leaf, ours, eager in zip([x, *wanted], found, expected, strict=True):
            if any(leaf is other for other in unused):
                assert ours is None and eager is None
                continue
            assert eager.abs().max() > 0
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())
