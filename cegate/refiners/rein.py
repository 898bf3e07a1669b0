"""Rein: learned tokens that refine the patch tokens after every block (Wei et al., CVPR 2024)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate.config import RefinerConfig
from cegate.errors import ConfigError

START_SCALE = 0.001


class Rein(nn.Module):
    """``f += s W_f(D + f)`` with ``D = softmax(f T^T / sqrt C)[1:] W_t(T[1:])`` on patch tokens f [N, C] of each block.

    Each layer has m tokens ``T = A B`` of rank r; both linear maps W and the scale s serve all layers. The first token
    takes attention and gives nothing back. Prefix tokens pass through.

    Order: within a block the sites of a toolbox come first, the frequency site included, and the refinement sees what
    they made of the block's output. That holds whatever plan is applied later.

    Args:
        vit: timm vision transformer; its blocks are hooked at once.
        config: tokens m >= 2 and rank r >= 1.
        query_width: width of the queries that the tokens also give, for a head that takes them; ``None``: none.

    Raises:
        ConfigError: too few tokens, or no rank.
    """

    def __init__(self, vit: nn.Module, config: RefinerConfig, *, query_width: int | None = None) -> None:
        super().__init__()
        if config.tokens < 2 or config.rank < 1:
            raise ConfigError(
                f"refiner.tokens={config.tokens}, refiner.rank={config.rank}: use 2 tokens or more (the first gives "
                "nothing back) and a rank of 1 or more"
            )
        self._vit = (vit,)  # a tuple, so that the backbone is no part of this module
        self._prefix = getattr(vit, "num_prefix_tokens", 0)
        depth, width = len(vit.blocks), vit.embed_dim
        patch = vit.patch_embed.patch_size[0]
        bound = math.sqrt(6 / (3 * patch**2 + math.sqrt(width * config.rank)))
        self.token_a = nn.Parameter(torch.empty(depth, config.tokens, config.rank).uniform_(-bound, bound))
        self.token_b = nn.Parameter(torch.empty(depth, config.rank, width).uniform_(-bound, bound))
        self.token_mlp, self.patch_mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(START_SCALE))
        if query_width is not None:
            self.query_mlp, self.query_merge = nn.Linear(width, query_width), nn.Linear(3 * query_width, query_width)
        self._places: list[RemovableHandle] = []
        self._hooks: dict[int, RemovableHandle] = {}
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether the tokens refine, and give the head its queries."""
        return bool(self._places)

    def attach(self) -> None:
        """Refine from now on."""
        if self.attached:
            return
        for layer, block in enumerate(self._vit[0].blocks):
            self._places.append(block.register_forward_pre_hook(partial(self._take_last_place, layer)))

    def unwrap(self) -> nn.Module:
        """Remove every hook and give the ViT back as it was; the tokens keep their weights until ``attach``."""
        for handle in (*self._places, *self._hooks.values()):
            handle.remove()
        self._places, self._hooks = [], {}
        return self._vit[0]

    def no_weight_decay(self) -> set[str]:
        """Names of this module's own weights that do not decay."""
        return {"token_a", "token_b", "scale"}

    def tokens(self, layer: int) -> Tensor:
        """The tokens of a layer, [m, C]."""
        return self.token_a[layer] @ self.token_b[layer]

    def refine(self, patches: Tensor, layer: int) -> Tensor:
        """Patch tokens [B, N, C] after a block -> refined, [B, N, C]."""
        tokens = self.tokens(layer)
        share = (patches @ tokens.mT / math.sqrt(patches.shape[-1])).softmax(-1)  # [B, N, m]
        found = share[..., 1:] @ self.token_mlp(tokens[1:])
        return patches + self.scale * self.patch_mlp(found + patches)

    def queries(self) -> Tensor:
        """Queries [m, query_width] float32 or wider of the tokens of all layers: their maximum, mean and last one."""
        with torch.autocast(self.token_a.device.type, enabled=False):
            tokens = self.query_mlp(self.token_a @ self.token_b)  # [L, m, width]
            # channel by channel, as published: the three values of a channel lie side by side
            merged = torch.stack([tokens.amax(0), tokens.mean(0), tokens[-1]], dim=-1).flatten(1)
            return self.query_merge(merged)

    def _take_last_place(self, layer: int, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        # a toolbox hooks its sites anew with every plan, behind what is hooked already
        if layer in self._hooks:
            self._hooks[layer].remove()
        self._hooks[layer] = block.register_forward_hook(partial(self._refine_output, layer))

    def _refine_output(self, layer: int, block: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Hook on the block output y [B, P + N, C]."""
        if not self._prefix:
            return self.refine(y, layer)
        return torch.cat([y[:, : self._prefix], self.refine(y[:, self._prefix :], layer)], dim=1)
