"""A whole training step of DINOv2-L with gated sites, beside the frozen backbone, every site, and other tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu
from models import VIT_L_512, make_batch, make_segmenter, mixed_precision
from peft_lora import SplitAttention, add_lora
from torch import Tensor, nn

from cegate.gate import GatePlan
from cegate.kernels.frequency_adapter import frequency_adapter_fft
from cegate.parts.earth_adapter import EarthAdapter
from cegate.segmenter import Segmenter

DEVICE, SIZE, ROUNDS = "cuda", VIT_L_512, 15
SITES, RANK = 18, 64
CANDIDATE, FROZEN = f"{SITES} sites", "frozen backbone + head"


def spread(depth: int, sites: int) -> GatePlan:
    """Sites where the paper finds them: semantic in the first third, spatial in the second, frequency in the last."""
    kinds = enumerate(("semantic", "spatial", "frequency"))
    return GatePlan([f"{kind}.{third * depth // 3 + i}" for third, kind in kinds for i in range(sites // 3)])


def frozen() -> Segmenter:
    """Gates off; the head learns."""
    return make_segmenter(SIZE).to(DEVICE).train()


class Plain(nn.Module):
    """The same weights as timm runs them, under the same head: what methods outside cegate sit on."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.vit, self.head, self.layers = model.vit, model.head, model.layers

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """[B]."""
        maps = self.vit.forward_intermediates(images, indices=self.layers, norm=False, intermediates_only=True)
        return self.head.loss(maps, labels)


def frozen_in_a_graph() -> Plain:
    """Gates off, but the gradient goes down to the first block: what any site in a low layer takes along."""
    model = Plain(frozen())
    model.vit.blocks[0].register_forward_pre_hook(lambda block, args: (args[0].requires_grad_(),))
    return model


def gated(sites: int | None) -> Segmenter:
    """Some sites, or all."""
    model = frozen()
    toolbox = model.toolbox
    toolbox.apply(GatePlan(toolbox.sites) if sites is None else spread(toolbox.depth, sites))
    return model


def earth_adapter() -> Plain:
    """Earth-Adapter on every layer as its paper defines it: FFT of the layer's output at full width, then experts."""
    gated = frozen()
    model = Plain(gated)
    model.experts = nn.ModuleList(part for part in gated.toolbox.modules() if isinstance(part, EarthAdapter))
    prefix, side = model.vit.num_prefix_tokens, SIZE.pixels // SIZE.patch
    for site, block in zip(model.experts.requires_grad_(), model.vit.blocks, strict=True):

        def add(block: nn.Module, args: tuple[Tensor, ...], y: Tensor, site: nn.Module = site) -> Tensor:
            weights = (site.down, site.down_bias, site.up, site.up_bias, site.router, site.router_bias, site.scale)
            patches = frequency_adapter_fft(y[:, prefix:].float(), (side, side), *weights, site.cutoff, site.band)
            return torch.cat([y[:, :prefix], patches.to(y.dtype)], dim=1)

        block.register_forward_hook(add)
    return model


def peft_lora() -> Plain:
    """PEFT's LoRA on q and v of every layer."""
    model = Plain(frozen())
    for block in model.vit.blocks:
        block.attn = SplitAttention(block.attn)
    add_lora(model.vit, RANK)
    return model


def make_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Forward, loss, backward and AdamW over everything that learns; gives the loss."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with mixed_precision(DEVICE):
            loss = model.loss(images, labels).mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def compare(benchmark, builders: dict[str, Callable[[], nn.Module]], tolerance: float, targets: dict[str, str]) -> None:
    """Every way starts as the frozen model, since what it adds starts at zero: equal first losses, then times."""
    batch = make_batch(SIZE, device=DEVICE)
    steps = {name: make_step(build(), *batch) for name, build in builders.items()}
    first, second = ({name: step().item() for name, step in steps.items()} for _ in range(2))
    assert first == pytest.approx(dict.fromkeys(steps, first[CANDIDATE]), rel=tolerance)
    assert all(second[name] != first[name] for name in steps)
    gpu_side_by_side(benchmark, steps, targets=targets, rounds=ROUNDS)


@needs_gpu
@pytest.mark.gpu
def bench_training_step(benchmark):
    ways = {
        CANDIDATE: partial(gated, SITES),
        FROZEN: frozen,
        f"{FROZEN}, gradient down to block 0": frozen_in_a_graph,
        "all sites": partial(gated, None),
        "Earth-Adapter by FFT on every layer": earth_adapter,
    }
    compare(benchmark, ways, 1e-4, {FROZEN: "<= 1.08"})


@needs_gpu
@pytest.mark.gpu
def bench_training_step_beside_peft(benchmark):
    pytest.importorskip("peft", exc_type=ImportError)
    ways = {CANDIDATE: partial(gated, SITES), FROZEN: frozen, f"PEFT LoRA, rank {RANK}": peft_lora}
    compare(benchmark, ways, 1e-2, {})
