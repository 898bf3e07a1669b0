"""A frozen timm vision transformer, run block by block with ports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import MethodType
from typing import NamedTuple, Protocol

from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cegate.backbone import blocks, sam
from cegate.backbone.ports import Circuit, Ports, Tokens
from cegate.backbone.stream import Stream
from cegate.errors import BackboneError

NOTHING = Circuit()


class Family(Protocol):
    """How the transformers of one family run; the three steps of a program."""

    def stem(self, vit: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int], object]:
        """Images [B, bands, H, W] -> tokens [B, T, C] before the first block, their grid, and what the blocks need
        beside them."""

    def form(self, block: nn.Module, where: str) -> object:
        """What a block does, equal for blocks that do the same."""

    def run(
        self, form: object, block: nn.Module, layer: int, stream: Stream, beside: object, ports: Ports, tokens: Tokens
    ) -> Stream:
        """One block on the residual stream [B, T, C]."""


class Plain:
    """timm's ``VisionTransformer``: DINOv2, MAE, DeiT, AugReg, and ours."""

    form = staticmethod(blocks.read_form)

    def stem(self, vit: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int], object]:
        x = vit._pos_embed(vit.patch_embed(images))
        return vit.norm_pre(x), vit.patch_embed.dynamic_feat_size(images.shape[-2:]), None

    def run(self, form, block, layer, stream, beside, ports, tokens):
        return blocks.run_block(form, blocks.read_weights(block), stream, None, ports, tokens)


class Rotary:
    """timm's ``Eva``: DINOv3, EVA-02 and others with rotary positions."""

    form = staticmethod(blocks.read_form)

    def stem(self, vit: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int], object]:
        x = vit.patch_embed(images)
        with images.device:  # timm makes DINOv3's places where it names no device; no copy from there can be recorded
            x, rope = vit._pos_embed(x)
        return vit.norm_pre(x), vit.patch_embed.dynamic_feat_size(images.shape[-2:]), (rope, vit)

    def run(self, form, block, layer, stream, beside, ports, tokens):
        rope, vit = beside
        if rope is not None and getattr(vit, "rope_mixed", False):
            rope = rope[layer]  # every layer has positions of its own
        return blocks.run_block(form, blocks.read_weights(block), stream, rope, ports, tokens)


FAMILIES: dict[type[nn.Module], Family] = dict([(VisionTransformer, Plain()), (Eva, Rotary()), sam.FAMILY])
"""timm class -> how it runs; the first that a model is an instance of."""


class Features(NamedTuple):
    """What a head sees of a batch."""

    maps: list[Tensor]
    """Patch tokens after some layers, shallow to deep: [B, C, h, w] each."""
    grid: tuple[int, int]
    queries: Tensor | None = None
    """[m, width] learned tokens for a head with queries, where a part gives some."""

    def split(self, sizes: Sequence[int]) -> list[Features]:
        """The features of batches that ran together, from the numbers of their samples; of several streams, each batch
        gets its part of every one."""
        if len(sizes) == 1:
            return [self]
        together = sum(sizes)
        streams = [m.unflatten(0, (-1, together)).split(list(sizes), dim=1) for m in self.maps]
        return [self._replace(maps=[m.flatten(0, 1) for m in maps]) for maps in zip(*streams, strict=True)]


class Backbone:
    """A program of blocks over a ViT, whose weights it reads as they are.

    The ViT runs without dropout and stochastic depth, whatever its mode: it is frozen.

    Args:
        vit: timm vision transformer.

    Raises:
        BackboneError: its blocks are of no form that is known here; the block is named.
    """

    def __init__(self, vit: nn.Module) -> None:
        self.vit = vit
        self.family = family_of(vit)
        self.forms = [
            self.family.form(block, f"block {n} of {type(vit).__name__}") for n, block in enumerate(vit.blocks)
        ]

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.forms)

    @property
    def width(self) -> int:
        """Channels C of the residual stream."""
        return self.vit.embed_dim

    @property
    def inner(self) -> int:
        """Channels of a layer's queries."""
        attn = self.vit.blocks[0].attn
        return attn.qkv.out_features // 3 if getattr(attn, "qkv", None) is not None else attn.q_proj.out_features

    @property
    def value_width(self) -> int:
        """Channels of a layer's values, fewer than of its queries where heads share them."""
        attn = self.vit.blocks[0].attn
        return self.inner if getattr(attn, "qkv", None) is not None else attn.v_proj.out_features

    @property
    def patch(self) -> int:
        """Patch side in pixels."""
        return self.vit.patch_embed.patch_size[0]

    @property
    def prefix(self) -> int:
        """Tokens in front of the grid: class token, registers."""
        return getattr(self.vit, "num_prefix_tokens", 0)

    @property
    def finish(self) -> Callable[[Tensor], Tensor] | None:
        """What the family makes of the last map [B, C, h, w] for a decoder, as SAM's neck does; None: nothing."""
        return partial(self.family.finish, self.vit) if hasattr(self.family, "finish") else None

    def tokens_after(
        self, images: Tensor, layers: Iterable[int], circuit: Circuit = NOTHING, *, streams: int = 1
    ) -> tuple[list[Tensor], Tokens]:
        """Tokens [B, T, C] after each of the given layers, and how they lie; later layers do not run.

        Args:
            images: [B, bands, H, W] normalised.
            layers: 0-based, increasing.
            circuit: what is plugged in.
            streams: modalities behind each other in the batch.
        """
        wanted = list(layers)
        x, grid, beside = self.family.stem(self.vit, images)
        stream, tokens, found = Stream(x), Tokens(self.prefix, tuple(grid), streams), []
        for layer in range(wanted[-1] + 1 if wanted else 0):
            block = self.vit.blocks[layer]
            stream = self.family.run(self.forms[layer], block, layer, stream, beside, circuit.at(layer), tokens)
            if layer in wanted:
                stream = Stream(stream.total())
                found.append(stream.x)
        return found, tokens

    def run(self, images: Tensor, layers: Iterable[int], circuit: Circuit = NOTHING, *, streams: int = 1) -> Features:
        """Maps [B, C, h, w] of the patch tokens after the given layers; no final norm. Arguments as above."""
        found, tokens = self.tokens_after(images, layers, circuit, streams=streams)
        maps = [x[:, tokens.prefix :].mT.unflatten(2, tokens.grid).contiguous() for x in found]
        return Features(maps, tokens.grid)

    # in place of the ViT's own passes --------------------------------------------------------------------------------

    def install(self, circuit: Callable[[], Circuit]) -> None:
        """Let the ViT itself run as this program, with whatever ``circuit()`` gives in each call, until `uninstall`.

        ``vit(images)``, ``forward_features`` and ``forward_intermediates`` do; a block that is called by itself does
        not.
        """
        self._circuit = circuit
        self.vit.forward_features = MethodType(Backbone._forward_features, self)
        self.vit.forward_intermediates = MethodType(Backbone._forward_intermediates, self)

    def uninstall(self) -> None:
        """Give the ViT its own passes back."""
        for name in ("forward_features", "forward_intermediates"):
            self.vit.__dict__.pop(name, None)

    def _forward_features(self, images: Tensor) -> Tensor:
        found, _ = self.tokens_after(images, [self.depth - 1], self._circuit())
        return self.vit.norm(found[0])

    def _forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """As timm's method of that name."""
        layers, last = feature_take_indices(self.depth, indices)
        wanted = sorted({*layers, last if stop_early or intermediates_only else self.depth - 1})
        found, tokens = self.tokens_after(x, wanted, self._circuit())
        chosen = [self.vit.norm(y) if norm else y for layer, y in zip(wanted, found, strict=True) if layer in layers]
        patches = [y[:, tokens.prefix :] for y in chosen]
        if output_fmt == "NCHW":
            patches = [y.mT.unflatten(2, tokens.grid).contiguous() for y in patches]
        if return_prefix_tokens:
            patches = list(zip(patches, (y[:, : tokens.prefix] for y in chosen), strict=True))
        return patches if intermediates_only else (self.vit.norm(found[-1]), patches)


def family_of(vit: nn.Module) -> Family:
    """How a model runs.

    Raises:
        BackboneError: no vision transformer that is known here; what is odd is named.
    """
    blocks_ = getattr(vit, "blocks", None)
    if not isinstance(blocks_, nn.ModuleList | nn.Sequential) or not len(blocks_):
        raise BackboneError(f"{type(vit).__name__} has no list of blocks; use a timm vision transformer")
    for kind, family in FAMILIES.items():
        if type(vit) is kind or (isinstance(vit, kind) and _runs_alike(vit, kind)):
            return family
    known = "DINOv2, DINOv3, MAE, DeiT, AugReg, EVA-02"
    raise BackboneError(f"{type(vit).__name__} runs its blocks in a way of its own; use a plain ViT ({known})")


def _runs_alike(vit: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a subclass leaves the passes of its base alone, such as timm's distilled DeiT does not its embedding."""
    own = type(vit)
    return own.forward_features is kind.forward_features and own.forward_intermediates is kind.forward_intermediates
