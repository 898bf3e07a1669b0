"""Segment Anything's image encoder (timm's ``samvit_*``) as a program of blocks, at any size of input.

A block attends within windows of 14 x 14 tokens, or globally, with positions relative to the query. Everything else
acts token by token, so it runs on [B, T, C]; only queries, keys and values are cut into windows, and what is plugged in
never sees a window. Two rewritings, both exact, spare what the published form spends on padding and on biases:

*No padded window.* SAM fills windows at the lower and right edge with tokens that are zero after the norm, so that
their keys and values are the bias of the projection, all alike. A window is cut to the tokens it has, and one more key
stands for all that it lacks: its logit is the logarithm of the sum of their exponentials. At 256 px (16 x 16 tokens) a
windowed block so attends from 256 places instead of 784, and projects as many.

*No bias in memory.* ``q . R_h[y_q - y_k] + q . R_w[x_q - x_k]`` is a product once more: of what the query says about
each row and column with the key's row and column in ones and zeros. It is appended to the channels of queries and keys,
so that attention needs no mask of T x T (805 MB a sample and block at 1024 px).

Source: Kirillov et al., Segment Anything, ICCV 2023 (relative positions: Li et al., MViTv2, CVPR 2022).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cegate.backbone.blocks import BlockWeights, leave, project, read_weights
from cegate.backbone.ports import Ports, Tokens
from cegate.backbone.stream import NormForm, Stream
from cegate.errors import BackboneError
from cegate.losses import at_least_float32

T = TypeVar("T")
EPS = 1e-6
"""Of SAM's LayerNorms; timm's models have 1e-5."""
SIZES = {768: "samvit_base_patch16", 1024: "samvit_large_patch16", 1280: "samvit_huge_patch16"}
"""Width -> timm's name."""
UNUSED = ("prompt_encoder.", "mask_decoder.", "pixel_mean", "pixel_std")
"""Of SAM's file: what decodes prompts."""


# weights -------------------------------------------------------------------------------------------------------------


def create_sam(name: str, *, pretrained: bool = False, in_chans: int = 3, patch_size: int | None = None) -> nn.Module:
    """timm's model with SAM's sizes and epsilon, so that SAM's file fits.

    It is built at its own size (1024 px), whatever the images will be: positions are resampled to an input when it
    comes. Weights are random unless ``pretrained``.
    """
    options = {} if patch_size is None else {"patch_size": patch_size}
    norm = partial(nn.LayerNorm, eps=EPS)
    return timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_chans, norm_layer=norm, **options)


def from_sam_names(state: Mapping[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    """Weights of SAM's public file by timm's names. Bands of the patch embedding are not compared.

    Args:
        state: what ``sam_vit_*.pth`` holds, prompt encoder and mask decoder included or not.
        vit: the model they are for.

    Raises:
        BackboneError: weights are missing, of another size, or have names that are not SAM's.
    """
    wanted = {key: value.shape for key, value in vit.state_dict().items()}
    found, strange = {}, []
    for key, value in state.items():
        if key.startswith("image_encoder."):
            found[re.sub(r"\.mlp\.lin(\d)", r".mlp.fc\1", key.removeprefix("image_encoder."))] = value
        elif not key.startswith(UNUSED):
            strange.append(key)
    width = found["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in found else None
    own = wanted["patch_embed.proj.weight"][0]
    if width is not None and width != own:
        named = f", which is {SIZES[width]}" if width in SIZES else ""
        raise BackboneError(
            f"these SAM weights have width {width}{named}; the backbone has {own}: give model.backbone their size"
        )
    strange += sorted(found.keys() - wanted.keys())
    if missing := sorted(wanted.keys() - found.keys()):
        raise BackboneError(
            f"{len(missing)} weights of the image encoder are missing, {missing[0]} first; give SAM's own file "
            "(sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth)"
        )
    if strange:
        raise BackboneError(f"{len(strange)} weights are none of SAM's, {strange[0]} first; give SAM's own file")
    for key, shape in wanted.items():
        given = found[key].shape
        if given != shape and (key != "patch_embed.proj.weight" or given[2:] != shape[2:]):
            raise BackboneError(
                f"{key} is {list(given)} in SAM's file and {list(shape)} in the backbone; build it at SAM's own sizes "
                "(create_sam: 1024 px, patches of 16)"
            )
    return found


def forget_relative_positions(vit: nn.Module) -> None:
    """Zero the tables of relative positions: MFNet's published code renames them, so that it never loads them
    (``model.official_relpos``)."""
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.rel_pos_h.zero_()
            block.attn.rel_pos_w.zero_()


# positions -----------------------------------------------------------------------------------------------------------


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The position embedding [1, H, W, C] for another grid, as SAM does it: bicubic, without antialiasing."""
    if tuple(positions.shape[1:3]) == grid:
        return positions
    resized = F.interpolate(
        at_least_float32(positions).permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


def relative_table(table: Tensor, count: int, side: int) -> Tensor:
    """What each of ``count`` query places along an axis knows of each of a window's ``side`` key places.

    Args:
        table: [2 S - 1, d], row: query place - key place + S - 1; resampled linearly to a window of another side.
        count: tokens along the axis; token y stands at place ``y % side`` of its window.
        side: places of a window.

    Returns:
        [count, side, d].
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(at_least_float32(table).mT[None], size=2 * side - 1, mode="linear")[0].mT.to(table.dtype)
    keys = torch.arange(side, device=table.device)
    queries = torch.arange(count, device=table.device) % side
    return table[queries[:, None] - keys + side - 1]


class Places(NamedTuple):
    """Relative positions of one block on one grid."""

    rows: Tensor
    """[h, S_h, d]: of each query row to the rows of its window."""
    columns: Tensor
    """[w, S_w, d]: of each query column to the columns of its window."""
    keys: Tensor
    """[h, w, 1, S_h + S_w + fill]: a key's row and column as ones among zeros. With windows, the last channel is free
    for the key that stands for padding; d + S_h + S_w + fill is a multiple of 8."""


def find_places(table_h: Tensor, table_w: Tensor, grid: tuple[int, int], window: int) -> Places:
    """Relative positions from a block's two tables; ``window`` 0: global attention."""
    sides = (window, window) if window else grid
    rows, columns = (relative_table(*axis) for axis in zip((table_h, table_w), grid, sides, strict=True))
    used = sum(sides) + (1 if window else 0)
    keys = rows.new_zeros(*grid, 1, used + -(rows.shape[-1] + used) % 8)
    y, x = (torch.arange(count, device=rows.device) for count in grid)
    keys[y, :, :, y % sides[0]] = 1
    keys[:, x, :, sides[0] + x % sides[1]] = 1
    return Places(rows, columns, keys)


_RESAMPLED = WeakTensorKeyDictionary()  # compares by identity
_MOST_SIZES = 8  # of input that are kept


def _kept(weights: tuple[Tensor, ...], key: object, make: Callable[[], T]) -> T:
    """``make()`` of some weights, kept while they stay as they are; made anew in every call while they learn."""
    if any(w.requires_grad or w.is_inference() for w in weights):
        return make()
    stamp = [(w.data_ptr(), w._version, w.device, w.dtype) for w in weights]
    known_stamp, known = _RESAMPLED.get(weights[0], (None, {}))
    if known_stamp != stamp or (key not in known and len(known) >= _MOST_SIZES):
        known = {}
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():  # what a prediction made must serve training too
            known[key] = make()
        _RESAMPLED[weights[0]] = (stamp, known)
    return known[key]


# attention -----------------------------------------------------------------------------------------------------------


def attend(qkv: Tensor, bias: Tensor | None, heads: int, window: int, grid: tuple[int, int], places: Places) -> Tensor:
    """Attention with relative positions, within windows or globally.

    Args:
        qkv: [B, h w, 3 C].
        bias: [3 C] of the projection: what queries, keys and values of padded tokens are.
        heads: attention heads.
        window: side of a window in tokens; 0: all tokens attend to all.
        grid: (h, w).
        places: of this block on this grid.

    Returns:
        [B, h w, C].
    """
    q, k, v = qkv.unflatten(1, grid).unflatten(3, (3, heads, -1)).unbind(3)  # [B, h, w, heads, d]
    d = q.shape[-1]
    rows = torch.einsum("byxnd,ykd->byxnk", q, places.rows)
    columns = torch.einsum("byxnd,xkd->byxnk", q, places.columns)
    k = torch.cat([k, places.keys.to(k.dtype).expand(*k.shape[:-1], -1)], -1)
    fill = k.shape[-1] - d - rows.shape[-1] - columns.shape[-1]
    q = torch.cat([q * d**-0.5, rows, columns, q.new_zeros(*q.shape[:-1], fill)], -1)
    v = F.pad(v, (0, k.shape[-1] - d))  # the fast kernels want one width
    if not window:
        return _attend_windows(q, k, v, grid)[..., :d].flatten(3).flatten(1, 2)
    padding = None if bias is None else bias.view(3, heads, d)[1:]
    bands = []
    for y, height in _stretches(grid[0], window):
        parts = []
        for x, width in _stretches(grid[1], window):
            q_, k_, v_ = (t[:, y : y + height, x : x + width] for t in (q, k, v))
            side = min(height, window), min(width, window)
            parts.append(_attend_windows(q_, k_, v_, side, Cut(window, d, padding))[..., :d])
        bands.append(torch.cat(parts, 2))
    return torch.cat(bands, 1).flatten(3).flatten(1, 2)


class Cut(NamedTuple):
    """What cut windows lack."""

    window: int
    """Side of a whole one."""
    d: int
    """Channels of a head."""
    padding: Tensor | None
    """[2, heads, d] key and value of a padded token; None: zeros."""


def _stretches(count: int, window: int) -> list[tuple[int, int]]:
    """(first token, tokens) along an axis: of the whole windows, and of the window that is cut."""
    whole = count // window * window
    return [(first, tokens) for first, tokens in ((0, whole), (whole, count - whole)) if tokens]


def _attend_windows(q: Tensor, k: Tensor, v: Tensor, side: tuple[int, int], cut: Cut | None = None) -> Tensor:
    """Attention within the windows of one size (height, width) that fill a map [B, h, w, heads, E]; the same shape."""
    down, across = q.shape[1] // side[0], q.shape[2] // side[1]

    def windows(t: Tensor) -> Tensor:  # [B down across, heads, tokens, E]
        t = t.unflatten(2, (across, side[1])).unflatten(1, (down, side[0]))
        return t.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    q, k, v = windows(q), windows(k), windows(v)
    if cut is not None and side != (cut.window, cut.window):
        q, k, v = _with_padding(q, k, v, side, cut)
    a = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    a = a.unflatten(0, (-1, down, across)).unflatten(4, side).permute(0, 1, 4, 2, 5, 3, 6)
    return a.flatten(3, 4).flatten(1, 2)


def _with_padding(q: Tensor, k: Tensor, v: Tensor, side: tuple[int, int], cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """One key for all tokens that a window lacks: they share key and value and differ in their relative positions."""
    (height, width), (window, d, padding) = side, cut
    rows, columns = at_least_float32(q[..., d : d + 2 * window]).split(window, dim=-1)
    lacking = []
    if height < window:
        lacking.append(rows[..., height:].logsumexp(-1) + columns.logsumexp(-1))
    if width < window:
        lacking.append(rows[..., :height].logsumexp(-1) + columns[..., width:].logsumexp(-1))
    logit = lacking[0] if len(lacking) == 1 else torch.logaddexp(*lacking)
    q = torch.cat([q[..., :-1], logit[..., None].to(q.dtype)], -1)
    key, value = k.new_zeros(2, k.shape[1], d) if padding is None else padding.to(k.dtype)
    rest = k.shape[-1] - d
    key = F.pad(F.pad(key, (0, rest - 1)), (0, 1), value=1)
    every = (len(k), -1, -1, -1)
    k = torch.cat([k, key[:, None].expand(every)], 2)
    return q, k, torch.cat([v, F.pad(value, (0, rest))[:, None].expand(every)], 2)


# the program ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamForm:
    """What a block does."""

    heads: int
    window: int
    """Side of a window in tokens; 0: global attention."""
    norm1: NormForm
    norm2: NormForm


def run_block(form: SamForm, w: BlockWeights, stream: Stream, places: Places, ports: Ports, tokens: Tokens) -> Stream:
    """One block on the residual stream [B, T, C]; the ports are those of the plain blocks."""
    x, u = stream.normed(form.norm1, w.norm1)
    qkv = project(u, w.projections)
    for add in ports.qkv:
        qkv = add(u, qkv, tokens)
    a = F.linear(attend(qkv, w.projections[0][1], form.heads, form.window, tokens.grid, places), *w.proj)
    for change in ports.attention:
        a = change(a, tokens)
    x, h = Stream(x, a).normed(form.norm2, w.norm2)
    f = F.linear(h, *w.fc1)
    for add in ports.fc1:
        f = add(h, f, tokens)
    g = F.gelu(f)
    m = F.linear(g, *w.fc2)
    for add in ports.fc2:
        m = add(g, m, tokens)
    return leave(x, h, Stream(x, m), ports, tokens)


class Sam:
    """timm's ``VisionTransformerSAM``."""

    def form(self, block: nn.Module, where: str) -> SamForm:
        attn = getattr(block, "attn", None)
        odd = [
            text
            for text, wrong in (
                (f"it is {type(block).__name__}", type(block) is not Block),
                (f"attn is {type(attn).__name__}", type(attn) is not Attention),
                ("it has no relative positions", not getattr(attn, "use_rel_pos", False)),
                ("it normalises queries", not isinstance(getattr(attn, "q_norm", None), nn.Identity)),
                ("it scales its layers", not isinstance(getattr(block, "ls1", None), nn.Identity)),
                (
                    "its MLP is another",
                    type(getattr(block, "mlp", None)) is not Mlp or type(block.mlp.act) is not nn.GELU,
                ),
            )
            if wrong
        ]
        if odd:
            raise BackboneError(
                f"{where} is no block of SAM's ({', '.join(odd)}); use timm's {', '.join(SIZES.values())}"
            )
        norm1, norm2 = (NormForm("layer", norm.eps) for norm in (block.norm1, block.norm2))
        return SamForm(attn.num_heads, block.window_size, norm1, norm2)

    def stem(self, vit: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int], list[Places]]:
        x = vit.patch_embed(images)  # [B, h, w, C]
        grid = tuple(x.shape[1:3])
        if vit.pos_embed is not None:
            x = x + _kept((vit.pos_embed,), grid, lambda: resize_positions(vit.pos_embed, grid))
        return vit.norm_pre(x).flatten(1, 2), grid, [self._places(block, grid) for block in vit.blocks]

    def _places(self, block: nn.Module, grid: tuple[int, int]) -> Places:
        tables = block.attn.rel_pos_h, block.attn.rel_pos_w
        return _kept(tables, (grid, block.window_size), lambda: find_places(*tables, grid, block.window_size))

    def run(self, form, block, layer, stream, beside, ports, tokens):
        return run_block(form, read_weights(block), stream, beside[layer], ports, tokens)

    def finish(self, vit: nn.Module, x: Tensor) -> Tensor:
        """SAM's neck: a map [B, C, h, w] after the last block -> [B, 256, h, w], which SAM's decoder and MFNet read."""
        return vit.neck(x)


FAMILY = (VisionTransformerSAM, Sam())
