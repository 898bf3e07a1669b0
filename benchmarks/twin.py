"""The toolbox written with ``nn.Linear`` alone, so that libraries for per-sample gradients can run it.

They know layers, not parameters, so the learnable scale of the frequency kind is a constant here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.backbone.backbone import Features
from cegate.kernels.low_pass import low_pass_fft
from cegate.parts.toolbox import Toolbox
from cegate.segmenter import Segmenter


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer that holds copies, on their device."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def in_autocast_dtype(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Hook before a layer: autocast converts inside, where a hook on inputs and output gradients sees two dtypes."""
    kind = args[0].device.type
    return (args[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else None


class TwinLayer(nn.Module):
    """All three kinds at one layer, hooked into a block."""

    def __init__(self, toolbox: Toolbox, layer: int, block: nn.Module, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        lora, adapter, earth = toolbox.spatial[layer], toolbox.semantic[layer], toolbox.frequency[layer]
        self.spatial = nn.ModuleDict(
            {part: linear(getattr(lora, part)) for part in ("down_q", "up_q", "down_v", "up_v")}
        )
        self.semantic = nn.ModuleDict(
            {part: linear(getattr(adapter, part), getattr(adapter, f"{part}_bias")) for part in ("down", "up")}
        )
        self.frequency = nn.ModuleDict({"router": linear(earth.router, earth.router_bias)})
        for j in range(3):
            self.frequency[f"down{j}"] = linear(earth.down[j], earth.down_bias[j])
            self.frequency[f"up{j}"] = linear(earth.up[j], earth.up_bias[j])
        for part in self.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(in_autocast_dtype)
        self.scales = (lora.scale, adapter.scale, earth.scale.item())
        self.prefix, self.grid, self.cutoff, self.x_att = prefix, grid, earth.cutoff, None
        block.attn.qkv.register_forward_hook(self.on_qkv)
        block.norm2.register_forward_pre_hook(self.on_norm2)
        block.register_forward_hook(self.on_block)

    def on_qkv(self, module: nn.Module, args: tuple[Tensor], qkv: Tensor) -> Tensor:
        (u,), s = args, self.scales[0]
        q, k, v = qkv.chunk(3, -1)
        q = q + s * self.spatial["up_q"](self.spatial["down_q"](u))
        v = v + s * self.spatial["up_v"](self.spatial["down_v"](u))
        return torch.cat([q, k, v], -1)

    def on_norm2(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.x_att = args[0]

    def on_block(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        y = y + self.scales[1] * self.semantic["up"](F.gelu(self.semantic["down"](self.x_att)))
        patches = y[:, self.prefix :]
        low = low_pass_fft(patches, self.grid, self.cutoff)
        weights = self.frequency["router"](patches).softmax(-1)
        mixture = 0
        for j, part in enumerate((patches, low, patches - low)):
            expert = self.frequency[f"up{j}"](F.relu(self.frequency[f"down{j}"](part)))
            mixture = mixture + weights[..., j : j + 1] * expert
        return torch.cat([y[:, : self.prefix], patches + self.scales[2] * mixture], 1)


class Twin(nn.Module):
    """Images and labels in, summed loss out; takes over the segmenter's backbone, whose own toolbox must be off."""

    def __init__(self, segmenter: Segmenter, pixels: int) -> None:
        super().__init__()
        toolbox, side = segmenter.toolbox, pixels // segmenter.backbone.patch
        prefix = segmenter.vit.num_prefix_tokens
        self.layers = nn.ModuleList(
            TwinLayer(toolbox, layer, block, prefix, (side, side)) for layer, block in enumerate(segmenter.vit.blocks)
        )
        self.backbone = [segmenter]  # no part of this module: it is frozen

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of each sample alone, [B]."""
        segmenter = self.backbone[0]
        grid = segmenter.vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        maps = segmenter.vit.forward_intermediates(
            images, indices=segmenter.layers, norm=False, intermediates_only=True
        )  # timm's own pass, which calls the hooks
        return segmenter.loss_of(Features(maps, grid), labels)
