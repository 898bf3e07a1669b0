from __future__ import annotations

import threading

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cegate.backbone.backbone import Backbone
from cegate.backbone.frozen import as_read, cast_frozen, reading


class Casts(TorchDispatchMode):
    """Counts casts to another dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def frozen(name: str) -> torch.nn.Module:
    size = {"samvit_base_patch16": {"img_size": 64, "window_size": 3, "global_attn_indexes": (1,)}}.get(name, {})
    vit = timm.create_model(name, embed_dim=48, depth=2, num_heads=2, **size).eval().requires_grad_(False)
    with torch.no_grad():
        for value in vit.parameters():
            value.normal_(0, 0.1)
    return vit


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "samvit_base_patch16"])
def test_a_pass_with_cast_weights_gives_the_numbers_of_autocast_with_fewer_casts(name):
    vit = frozen(name)
    side = 64 if "sam" in name else vit.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            maps = Backbone(vit).run(images, [0, 1]).maps
        (gradient,) = torch.autograd.grad(sum(m.float().square().sum() for m in maps), images)
        return torch.stack([m.float() for m in maps]), gradient, casts.count

    maps, gradient, casts = run()
    with reading(cast_frozen(vit, torch.bfloat16)):
        cast_maps, cast_gradient, fewer = run()
    assert torch.equal(maps, cast_maps)
    assert torch.equal(gradient, cast_gradient)
    assert fewer <= casts - 2 * 4  # four matrices a block


def test_weights_that_learn_are_not_cast_and_other_threads_read_their_own():
    vit = frozen("vit_tiny_patch16_224")
    vit.blocks[0].mlp.fc1.requires_grad_(True)
    cast = cast_frozen(vit, torch.bfloat16)
    learning, kept = vit.blocks[0].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight
    assert learning not in cast
    elsewhere = []
    with reading(cast):
        assert as_read(learning) is learning
        assert as_read(kept).dtype == torch.bfloat16
        thread = threading.Thread(target=lambda: elsewhere.append(as_read(kept)))
        thread.start(), thread.join()
    assert elsewhere[0] is kept
    assert as_read(kept) is kept
