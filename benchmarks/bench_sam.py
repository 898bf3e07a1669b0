"""SAM's encoder as a program of blocks beside timm's, two modalities beside a batch of two, and what is behind."""

from __future__ import annotations

import pytest
import torch
from side_by_side import side_by_side
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from cegate.backbone import sam
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Circuit
from cegate.heads.unetformer import UNetFormerHead
from cegate.necks.dfm import DFM
from cegate.parts.mm_adapter import MMAdapter
from cegate.parts.mm_lora import MMLoRA

SIZES = {"width 192": {"embed_dim": 192, "depth": 6, "num_heads": 3, "global_attn_indexes": (2, 5)}, "ViT-B": {}}
PIXELS = 256


def make_encoder(size: str) -> nn.Module:
    """Random weights, frozen; positions resampled beforehand as SAM does it, so that timm's own run agrees."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = {"img_size": 1024, "num_classes": 0, "use_rel_pos": True, "window_size": 14}
        vit = VisionTransformerSAM(**plain, **SIZES[size]) if SIZES[size] else sam.create_sam("samvit_base_patch16")
        for weight in vit.parameters():
            nn.init.normal_(weight, std=0.02)
    grid = (PIXELS // 16, PIXELS // 16)
    vit.pos_embed = nn.Parameter(sam.resize_positions(vit.pos_embed.detach(), grid))
    return vit.eval().requires_grad_(False)


def rounds(size: str) -> int:
    return 9 if size != "ViT-B" else 3


@pytest.mark.parametrize("size", SIZES)
def bench_encoder(benchmark, size):
    vit, images = make_encoder(size), torch.randn(2, 3, PIXELS, PIXELS)
    backbone = Backbone(vit)
    with torch.no_grad():
        got = side_by_side(
            benchmark,
            lambda: vit.neck(backbone.run(images, [backbone.depth - 1]).maps[0]),
            {"timm's encoder": lambda: vit.forward_features(images)},
            rounds=rounds(size),
            warmup=1,
            target={"timm's encoder": "<= 0.8"},
        )
        torch.testing.assert_close(got, vit.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [MMLoRA, MMAdapter])
@pytest.mark.parametrize("size", SIZES)
def bench_two_modalities(benchmark, size, part):
    backbone, images = Backbone(make_encoder(size)), torch.randn(2, 3, PIXELS, PIXELS)
    layers, circuit = [backbone.depth - 1], Circuit(part.build(backbone).plugs())
    with torch.no_grad():
        side_by_side(
            benchmark,
            lambda: backbone.run(images, layers, circuit, streams=2).maps[0],
            {"the encoder on a batch of two": lambda: backbone.run(images, layers).maps[0]},
            rounds=rounds(size),
            warmup=1,
            target={"the encoder on a batch of two": "<= 1.05"},
        )


def bench_neck_and_head_in_a_training_step(benchmark):
    """ViT-B; the rest of the step is the encoder's forward and backward pass with MMLoRA."""
    backbone = Backbone(make_encoder("ViT-B"))
    lora, neck, head = MMLoRA.build(backbone), DFM(768, project=backbone.finish), UNetFormerHead(256, 6)
    images, labels = torch.randn(2, 3, PIXELS, PIXELS), torch.randint(0, 6, (1, PIXELS, PIXELS))
    circuit, maps = Circuit(lora.plugs()), torch.randn(2, 768, 16, 16, requires_grad=True)

    def behind():
        head.loss(neck(maps), labels).mean().backward()

    def step():
        head.loss(neck(backbone.run(images, [11], circuit, streams=2).maps[0]), labels).mean().backward()

    side_by_side(benchmark, behind, {"a step": step}, rounds=3, warmup=1, target={"a step": "<= 0.2"})
