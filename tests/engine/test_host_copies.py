"""A CUDA graph cannot record a copy from the host. Tensors without memory show the copies where there is no GPU."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cegate.backbone.backbone import Backbone
from cegate.losses import pixel_loss_of

VITS = {
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "eva02_tiny_patch14_224": {"dynamic_img_size": True},
    "vit_small_patch16_dinov3": {"dynamic_img_size": True},
    "samvit_base_patch16": {"embed_dim": 48, "num_heads": 2},  # at 16 x 16 tokens its windows are cut
}


class Copies(TorchDispatchMode):
    """Operators that took tensors of the host and gave others."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (
            {t.device.type for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), result)
        )
        if function.__name__.startswith(("_to_copy", "copy_")) and "cpu" in given and made - {"cpu"}:
            self.found.append(function.__name__)
        return result


@pytest.mark.parametrize("name", VITS)
def test_no_backbone_copies_from_the_host(name):
    backbone = Backbone(timm.create_model(name, num_classes=0, depth=2, **VITS[name]).requires_grad_(False).to("meta"))
    images = torch.empty(2, 3, *(2 * [16 * backbone.patch]), device="meta")
    backbone.run(images, [1])  # fills caches
    with Copies() as copies:
        backbone.run(images, [1])
    assert copies.found == []


@pytest.mark.parametrize("weights", [None, [1, 2, 0.5]])
def test_no_loss_copies_from_the_host(weights):
    with FakeTensorMode():  # on "meta" a list of numbers is not even looked at
        logits, labels = torch.empty(2, 3, 4, 4, device="cuda"), torch.zeros(2, 4, 4, dtype=torch.int64, device="cuda")
        with Copies() as copies:
            pixel_loss_of("ce+focal+dice", weights)(logits, labels)
    assert copies.found == []
