"""Deformable attention: every query sums a few values of each level, read between pixels at places of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._support import HAS_TRITON, is_traced, pick_backend, refuse_second_derivatives

Sizes = Sequence[tuple[int, int]]
QUERIES = 32
"""That a program takes, of one head: with 32 channels a row of values is one line of memory."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._support import pad

    @triton.jit
    def _between(at, side):
        """Where -1..1 lies on a line of pixels: the one before, as a number and as an index, and how far behind it."""
        at = ((at + 1.0) * side - 1.0) * 0.5
        low = tl.floor(at)
        index = tl.minimum(tl.maximum(low, -2.0), side + 1.0).to(tl.int32)  # what lies far outside is outside
        return index, at - low

    @triton.jit
    def _corner(x, y, right, below, width, height, ok, DX: tl.constexpr, DY: tl.constexpr):
        """One of the four pixels around a place: its row in the level, whether there is one, its share in x and y."""
        column, line = x + DX, y + DY
        inside = ok & (column >= 0) & (column < width) & (line >= 0) & (line < height)
        share_x, share_y = right, below
        if DX == 0:
            share_x = 1.0 - right
        if DY == 0:
            share_y = 1.0 - below
        return line * width + column, inside, share_x, share_y

    @triton.jit
    def _deformable_kernel(
        values_ptr, places_ptr, weights_ptr, sizes_ptr, out_ptr, rows, queries, heads, d, levels, points,
        BQ: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        """Some queries of one head of one sample."""
        head, sample = tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
        n, c = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BD)
        ok, c_ok = n < queries, c < d
        own = (sample * queries + n) * heads + head
        total = tl.zeros([BQ, BD], tl.float32)
        for level in range(levels):
            height, width = tl.load(sizes_ptr + 3 * level), tl.load(sizes_ptr + 3 * level + 1)
            base = (sample * rows + tl.load(sizes_ptr + 3 * level + 2)) * heads + head
            for point in range(points):
                at = own * (levels * points) + level * points + point
                weight = tl.load(weights_ptr + at, mask=ok, other=0.0)
                x, right = _between(tl.load(places_ptr + 2 * at, mask=ok, other=0.0), width)
                y, below = _between(tl.load(places_ptr + 2 * at + 1, mask=ok, other=0.0), height)
                for k in tl.static_range(4):
                    row, inside, sx, sy = _corner(x, y, right, below, width, height, ok, k % 2, k // 2)
                    value = values_ptr + (base + row.to(tl.int64) * heads)[:, None] * d + c[None, :]
                    value = tl.load(value, mask=inside[:, None] & c_ok[None, :], other=0.0)
                    total += (weight * (sx * sy))[:, None] * value
        tl.store(out_ptr + own[:, None] * d + c[None, :], total, mask=ok[:, None] & c_ok[None, :])

    @triton.jit
    def _deformable_backward_kernel(
        values_ptr, places_ptr, weights_ptr, sizes_ptr, dout_ptr, dvalues_ptr, dplaces_ptr, dweights_ptr,
        rows, queries, heads, d, levels, points,
        BQ: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        """Some queries of one head of one sample; what values get from many queries is added up in memory."""
        head, sample = tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
        n, c = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BD)
        ok, c_ok = n < queries, c < d
        own = (sample * queries + n) * heads + head
        dout = tl.load(dout_ptr + own[:, None] * d + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
        for level in range(levels):
            height, width = tl.load(sizes_ptr + 3 * level), tl.load(sizes_ptr + 3 * level + 1)
            base = (sample * rows + tl.load(sizes_ptr + 3 * level + 2)) * heads + head
            for point in range(points):
                at = own * (levels * points) + level * points + point
                weight = tl.load(weights_ptr + at, mask=ok, other=0.0)
                x, right = _between(tl.load(places_ptr + 2 * at, mask=ok, other=0.0), width)
                y, below = _between(tl.load(places_ptr + 2 * at + 1, mask=ok, other=0.0), height)
                dweight, dx, dy = tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32)
                for k in tl.static_range(4):
                    row, inside, sx, sy = _corner(x, y, right, below, width, height, ok, k % 2, k // 2)
                    place = (base + row.to(tl.int64) * heads)[:, None] * d + c[None, :]
                    there = inside[:, None] & c_ok[None, :]
                    along = tl.sum(tl.load(values_ptr + place, mask=there, other=0.0) * dout, 1)
                    dweight += sx * sy * along
                    dx += (2 * (k % 2) - 1) * sy * along
                    dy += (2 * (k // 2) - 1) * sx * along
                    tl.atomic_add(dvalues_ptr + place, (weight * (sx * sy))[:, None] * dout, mask=there, sem="relaxed")
                tl.store(dweights_ptr + at, dweight, mask=ok)
                tl.store(dplaces_ptr + 2 * at, weight * dx * width * 0.5, mask=ok)
                tl.store(dplaces_ptr + 2 * at + 1, weight * dy * height * 0.5, mask=ok)


def _grid(values: Tensor, weights: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Programs, the sizes that both kernels take, and their blocks."""
    (batch, rows, heads, d), (_, queries, _, levels, points) = values.shape, weights.shape
    blocks = {"BQ": QUERIES, "BD": pad(d), "num_warps": 4}
    return (triton.cdiv(queries, QUERIES), batch * heads), (rows, queries, heads, d, levels, points), blocks


def _forward(values, places, weights, table):
    grid, sizes, blocks = _grid(values, weights)
    out = values.new_empty(*weights.shape[:3], values.shape[-1])
    _deformable_kernel[grid](values, places, weights, table, out, *sizes, **blocks)
    return out


def _backward(values, places, weights, table, dout):
    grid, sizes, blocks = _grid(values, weights)
    dvalues, dplaces, dweights = torch.zeros_like(values), torch.empty_like(places), torch.empty_like(weights)
    given = values, places, weights, table, dout
    _deformable_backward_kernel[grid](*given, dvalues, dplaces, dweights, *sizes, **blocks)
    return dvalues, dplaces, dweights


class _Deformable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, places, weights, table):
        ctx.save_for_backward(values, places, weights, table)
        return _forward(values, places, weights, table)

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivatives("deformable_attention")
        return *_backward(*ctx.saved_tensors, dout.contiguous()), None


def deformable_attention(
    values: Tensor, places: Tensor, weights: Tensor, sizes: Sizes, *, table: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Sum over levels and points of weight times the value at a place, bilinear between pixels, 0 outside the map.

    Args:
        values: [B, M, heads, d], the pixels of all levels one behind the other, row by row; float32 in Triton.
        places: [B, N, heads, L, P, 2] x and y, -1..1 across the image.
        weights: [B, N, heads, L, P].
        sizes: (height, width) of the L levels.
        table: `level_table` of the sizes, on the device, where it is at hand.
        backend: "auto", "torch" or "triton". In Triton the gradient of the values is summed in no fixed order, as that
            of ``grid_sample`` is on a GPU.

    Returns:
        [B, N, heads, d].

    Raises:
        ValueError: M is not the number of pixels of all levels.

    Source: Deformable DETR, Zhu et al., ICLR 2021.
    """
    if values.shape[1] != sum(h * w for h, w in sizes):
        raise ValueError(f"deformable_attention: {values.shape[1]} values for levels of {sizes}")
    tensors = {"values": values, "places": places, "weights": weights}
    is_strict = torch.get_deterministic_debug_mode() == 2  # an error, not a warning
    limits = ["deterministic algorithms are on, and gradients of values are summed in no fixed order"] * is_strict
    chosen = pick_backend("deformable_attention", backend, (torch.float32,), limits, **tensors)
    if chosen == "torch" or is_traced(values) or not weights.numel():
        return _plain(values, places, weights, sizes)
    table = level_table(sizes, values.device) if table is None else table
    return _Deformable.apply(values.contiguous(), places.contiguous(), weights.contiguous(), table)


def level_table(sizes: Sizes, device: torch.device) -> Tensor:
    """[L, 3] int32: height, width and first row of each level."""
    rows, first = [], 0
    for height, width in sizes:
        rows.append((height, width, first))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _plain(values: Tensor, places: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """By ``grid_sample``. Levels first, heads beside samples, and points before queries: a sum over a last axis of four
    is slow."""
    batch, _, heads, d = values.shape
    maps = values.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], dim=2)
    grid = places.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [L, B heads, P, N, 2]
    shares = weights.permute(3, 0, 2, 4, 1).flatten(1, 2).unsqueeze(2)
    found = [
        (F.grid_sample(v.unflatten(2, size), at, align_corners=False) * share).sum(2)  # [B heads, d, N]
        for v, size, at, share in zip(maps, sizes, grid, shares, strict=True)
    ]
    return sum(found[1:], found[0]).view(batch, heads, d, -1).permute(0, 3, 1, 2)
