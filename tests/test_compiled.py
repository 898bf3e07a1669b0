"""Compiled equals eager, for results and every gradient: a block that uses every operator, in one graph."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from cegate import native, ops
from cegate.kernels._support import HAS_TRITON, is_interpreted

CHANNELS, WIDTH, RANK = 16, 4, 3
GRIDS = [(4, 4), (3, 5)]


def make_leaves(device: torch.device) -> list[Tensor]:
    """Frozen projection [3C, C]; then what learns: LoRA, a bottleneck adapter, a frequency adapter, its cutoff."""
    maps = [(RANK, CHANNELS), (CHANNELS, RANK)] * 2
    bottleneck = [(RANK, CHANNELS), (CHANNELS, RANK), (RANK,), (CHANNELS,)]
    experts = [(3, WIDTH, CHANNELS), (3, WIDTH), (3, CHANNELS, WIDTH), (3, CHANNELS), (3, CHANNELS), (3,), ()]
    tensors = [torch.randn(shape, device=device).mul_(0.4) for shape in [*maps, *bottleneck, *experts, ()]]
    return [torch.randn(3 * CHANNELS, CHANNELS, device=device), *(tensor.requires_grad_() for tensor in tensors)]


def block(x: Tensor, leaves: list[Tensor], grid: tuple[int, int], scale: float, backend: str) -> list[Tensor]:
    """Every operator, as a transformer block and a Fisher pass use them: a loss, and results without a gradient."""
    frozen, lora, adapter, experts, cutoff = leaves[0], leaves[1:5], leaves[5:9], leaves[9:16], leaves[16]
    qkv = linear(x, frozen)
    ops.low_rank_qv_(qkv, x, *lora, scale, backend=backend)  # in place: its result is qkv itself
    query, value = qkv[..., :CHANNELS], qkv[..., 2 * CHANNELS :]
    rest = {"down_bias": adapter[2], "up_bias": adapter[3], "activation": "gelu", "scale": scale, "backend": backend}
    y = ops.low_rank(query, *adapter[:2], base=value, **rest)
    z = ops.frequency_adapter(y, grid, *experts, 0.6, prefix=1, backend=backend)
    if backend == "torch":  # of the others the interpreter is slow, and C++ knows no learnable cutoff
        z = ops.frequency_adapter(z, grid, *experts, cutoff, prefix=1, backend=backend)
    smooth = ops.low_pass(z[:, 1:], grid, 0.7 if backend == "cpp" else cutoff, backend=backend)
    if backend == "cpp":  # what scoring takes on a CPU
        weights = [weight.detach() for weight in (*adapter[:2], *experts)]
        factors = [*ops.low_rank_factors(y.detach(), y.detach(), *weights[:2], scale=scale)]
        factors += ops.frequency_adapter_factors(smooth.detach(), smooth.detach(), grid, *weights[2:], cutoff=0.6)[:-1]
    else:
        factors = [ops.sum_squared_gradients(x, z.detach(), backend=backend)]
    return [(z[:, :1] @ smooth.mT).square().mean(), *factors]


def run_backends(x: Tensor, leaves: dict[str, list[Tensor]], grid: tuple[int, int], scale: float) -> list[list[Tensor]]:
    return [block(x, own, grid, scale, backend) for backend, own in leaves.items()]


# a graph of every backend with either kind of sizes would take a minute
@pytest.mark.parametrize(
    ("dynamic", "backends"), [(False, ("torch",)), (True, ("triton", "cpp"))], ids=["static", "dynamic"]
)
def test_results_and_every_gradient_are_those_of_an_eager_call(dynamic, backends, device):
    there = {
        "torch": True,
        "triton": HAS_TRITON and (device.type == "cpu") == is_interpreted(),
        "cpp": native.EXTENSION is not None and device.type == "cpu",
    }
    leaves = {backend: make_leaves(device) for backend in backends if there[backend]}
    if not leaves:
        pytest.skip(f"{backends} cannot run here")
    wanted = [leaf for backend, own in leaves.items() for leaf in own[1 : 16 if backend == "cpp" else 17]]
    torch.compiler.reset()
    compiled = torch.compile(run_backends, fullgraph=True, dynamic=dynamic)
    # another grid and another scale: the compiler turns sizes and numbers that change into symbols
    for grid, scale in zip(GRIDS[: 2 if dynamic else 1], (0.3, 0.7), strict=False):
        x = torch.randn(2, 1 + grid[0] * grid[1], CHANNELS, device=device, requires_grad=True)
        # no vector code: it takes the C++ compiler twice as long and is none of ours
        with patch("torch._inductor.config.cpp.vec_isa_ok", False):
            found, expected = (function(x, leaves, grid, scale) for function in (compiled, run_backends))
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(sum(own[0] for own in parts), [x, *wanted]) for parts in (found, expected)]
        for ours, eager in zip(*gradients, strict=True):
            assert eager.abs().max() > 0
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())


def test_a_compiler_is_not_asked_whether_sums_and_norms_are_fused():
    """torch 2.11 cannot trace the question, and a compiler fuses by itself."""
    with ops.fused():
        compiled = torch.compile(lambda x: x + ops.is_fused(), fullgraph=True, backend="eager")
        assert ops.is_fused() and compiled(torch.zeros(())) == 0
