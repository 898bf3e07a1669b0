"""LoRA on q and v as Hugging Face PEFT runs it.

PEFT wraps whole linear layers, so the fused projection is split into three first, with equal results. They go into the
attention as they are, as in models that never fused them: joining them again would be a cost that is not PEFT's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from twin import linear


class Projections(nn.Module):
    """q, k and v [B, T, D] of a fused projection, each by a layer of its own."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
        self.q_proj, self.k_proj, self.v_proj = (linear(*part).requires_grad_(False) for part in parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class SplitAttention(nn.Module):
    """timm's attention over split projections."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.projections, self.proj = Projections(attn.qkv.weight, attn.qkv.bias), attn.proj
        self.heads = attn.num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: bool) -> Tensor:
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.projections(x)]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask, **options)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def add_lora(module: nn.Module, rank: int) -> None:
    """LoRA of scale 1 on every q and v projection inside, in place; only it learns then."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    get_peft_model(module, config, autocast_adapter_dtype=False)
