"""Low-rank maps beside eager modules: the bottleneck adapter, LoRA, and LoRA layers as Hugging Face PEFT runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gpu_side_by_side import forward_backward, gpu_side_by_side, needs_gpu, rotate, with_gradient
from peft_lora import Projections, add_lora
from side_by_side import side_by_side
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from cegate.kernels.low_rank import low_rank, low_rank_qv_

DEVICE, BACKEND = "cuda", "triton"
CHANNELS, RANK = 1024, 64
GPU_SIZES = [(4, 1024), (4, 4096), (16, 1024), (16, 4096)]
TARGET = "<= 1; <= 0.77 at 4 x 1024"

MOVED = {"adapter": (3, 3), "lora": (5, 4), "layer": (4, 5)}
"""Tensors of tokens x channels that a forward and a backward pass read and write at least.

Adapter: x, base, y; dy, x, dx. LoRA: x, q and v read and written; dq, dv, x, dx. Layer: x, qkv; dqkv, x, dx.
"""


def randoms(*shapes, learn, **options):
    """Tensors a tenth of normal; ``learn`` says which want a gradient."""
    tensors = [torch.randn(shape, **options).mul_(0.1) for shape in shapes]
    return [tensor.requires_grad_(wants) for tensor, wants in zip(tensors, learn, strict=True)]


def make_adapter(batch, tokens, **options):
    """x and base (want gradients, as inside a network), down, up and their biases."""
    shapes = [(batch, tokens, CHANNELS)] * 2 + [(RANK, CHANNELS), (CHANNELS, RANK), (RANK,), (CHANNELS,)]
    return randoms(*shapes, learn=[True] * 6, **options)


def fused_adapter(x, base, down, up, down_bias, up_bias, backend):
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    return low_rank(x, down, up, base=base, **biases, activation="gelu", scale=0.1, backend=backend)


def eager_adapter(x, base, down, up, down_bias, up_bias):
    return base + 0.1 * linear(gelu(linear(x, down, down_bias)), up, up_bias)


MAPS = [(RANK, CHANNELS), (CHANNELS, RANK)] * 2


def make_lora(batch, tokens, **options):
    """The frozen projection's output, x, then the maps of q and v."""
    shapes = [(batch, tokens, 3 * CHANNELS), (batch, tokens, CHANNELS), *MAPS]
    return randoms(*shapes, learn=[False] + [True] * 5, **options)


def fused_lora(qkv, x, *maps, backend):
    """Adds to qkv, call by call; its history ends here."""
    return low_rank_qv_(qkv.detach(), x, *maps, backend=backend)


def eager_lora(qkv, x, down_q, up_q, down_v, up_v):
    """LoRA on q and v with two linear layers each."""
    q, k, v = qkv.chunk(3, dim=-1)
    return torch.cat([q + linear(linear(x, down_q), up_q), k, v + linear(linear(x, down_v), up_v)], dim=-1)


def make_layer(batch, tokens, **options):
    """The frozen projection itself (weight and bias), x, then the maps of q and v."""
    shapes = [(3 * CHANNELS, CHANNELS), (3 * CHANNELS,), (batch, tokens, CHANNELS), *MAPS]
    return randoms(*shapes, learn=[False] * 2 + [True] * 5, **options)


def fused_layer(weight, bias, x, *maps, backend):
    return low_rank_qv_(linear(x, weight, bias), x, *maps, backend=backend)


def eager_layer(weight, bias, x, *maps):
    return eager_lora(linear(x, weight, bias), x, *maps)


# maker, index of the tensor that the output looks like, ours, eager
CASES = {
    "adapter": (make_adapter, 0, fused_adapter, eager_adapter),
    "lora": (make_lora, 0, fused_lora, eager_lora),
}


def check(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


def floors(case: str, tokens: int, backward: bool) -> dict[str, int]:
    """Bytes in bfloat16 and operations of a forward pass, or of forward and backward."""
    passes = 2 if backward else 1
    maps = 1 if case == "adapter" else 2
    moved = 2 * tokens * CHANNELS * sum(MOVED[case][:passes])
    flops = maps * 4 * tokens * CHANNELS * RANK * (3 if backward else 1)  # backward: to inputs and to weights
    if case == "layer":  # the frozen projection: its weight is read in each pass, and has no gradient
        moved += passes * 2 * 3 * CHANNELS**2
        flops += passes * 2 * tokens * CHANNELS * 3 * CHANNELS
    return {"moved_bytes": moved, "flops": flops}


@pytest.mark.parametrize("case", CASES)
def bench_low_rank_on_the_cpu(benchmark, case):
    make, like, fused, eager = CASES[case]
    tensors = with_gradient(partial(make, 2, 1025), like)()
    eagerly = partial(forward_backward(eager), *tensors)
    ours = partial(forward_backward(partial(fused, backend="torch")), *tensors)
    expected = eagerly()  # before ours, which may change an input
    check(ours(), expected, 1e-4)
    side_by_side(benchmark, ours, {"eager": eagerly}, rounds=5, target={"eager": "<= 1"})


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_low_rank(benchmark, case, size, backward):
    make, like, fused, eager = CASES[case]
    inputs = rotate(with_gradient(partial(make, *size, device=DEVICE, dtype=torch.bfloat16), like))
    ways = {"candidate": partial(fused, backend=BACKEND), "eager": eager}
    ways = {name: forward_backward(way) if backward else forward(way) for name, way in ways.items()}
    expected = ways["eager"](*inputs[0])  # before ours, which may change an input
    check(ways["candidate"](*inputs[0]), expected, 0.05)
    known = floors(case, size[0] * size[1], backward)
    gpu_side_by_side(benchmark, ways, inputs, **known, targets={"eager": TARGET})


def forward(op: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``op`` alone, on inputs with a gradient at their end."""
    return torch.no_grad()(lambda *tensors: [op(*tensors[:-1])])


class PeftLayers:
    """PEFT's layers for every set of inputs, since they hold their weights."""

    def __init__(self, inputs: list[list[Tensor]]) -> None:
        self.layers = {tensors[2].data_ptr(): self.make(*tensors[:2], *tensors[3:7]) for tensors in inputs}

    @staticmethod
    def make(weight: Tensor, bias: Tensor, *maps: Tensor) -> Projections:
        layers = Projections(weight, bias)
        add_lora(layers, RANK)
        for layer, down, up in ((layers.q_proj, *maps[:2]), (layers.v_proj, *maps[2:])):
            layer.lora_A["default"].weight = nn.Parameter(down.detach().clone())
            layer.lora_B["default"].weight = nn.Parameter(up.detach().clone())
        return layers

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """q, k and v."""
        with torch.no_grad():
            return list(self.layers[tensors[2].data_ptr()](tensors[2]))

    def forward_backward(self, *tensors: Tensor) -> list[Tensor]:
        """q, k, v, then the gradients of x and of the maps."""
        x, dqkv = tensors[2], tensors[-1]
        layers = self.layers[x.data_ptr()]
        qkv = layers(x)
        maps = [part["default"].weight for p in (layers.q_proj, layers.v_proj) for part in (p.lora_A, p.lora_B)]
        return [part.detach() for part in qkv] + list(torch.autograd.grad(qkv, [x, *maps], dqkv.chunk(3, dim=-1)))


def make_layer_and_gradient(batch, tokens, **options):
    return [*make_layer(batch, tokens, **options), torch.rand(batch, tokens, 3 * CHANNELS, **options)]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def bench_lora_layer_beside_peft(benchmark, size, backward):
    """The frozen projection with its LoRA, for PEFT's layers cannot be had without theirs."""
    pytest.importorskip("peft", exc_type=ImportError)
    inputs = rotate(partial(make_layer_and_gradient, *size, device=DEVICE, dtype=torch.bfloat16))
    peft = PeftLayers(inputs)
    ways = {"candidate": partial(fused_layer, backend=BACKEND), "eager": eager_layer}
    ways = {name: forward_backward(way) if backward else forward(way) for name, way in ways.items()}
    ways["PEFT"] = peft.forward_backward if backward else peft.forward
    ours, eager, theirs = (way(*inputs[0]) for way in ways.values())
    check(ours, eager, 0.05)
    check(ours, [torch.cat(theirs[:3], dim=-1), *theirs[3:]], 0.05)
    known = floors("layer", size[0] * size[1], backward)
    gpu_side_by_side(benchmark, ways, inputs, **known, targets={"eager": TARGET, "PEFT": TARGET})
