"""Triton kernels of the frequency adapter: three launches forward, five backward, plus the fixed-order sums.

A tile is a few whole rows of the grid, so that the first DFT product of a row (``by_row``, [B, H, L, 2D]) and the last
run on values the program holds in registers; only the product across rows is a launch of its own. The second pass over
the wide tensor visits the tiles in reverse, to find in L2 what the first pass read last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._support import HAS_TRITON, dot_block, pad
from .low_pass import GridFilter, filter_precision

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._support import dot
    from ._weight_gradient import weight_gradient
    from .low_pass import filter_column

    @triton.jit
    def _tile(pid, tokens, width, rows, tiles):
        """Image, first grid row and first token of a tile."""
        image = pid // tiles
        first_row = (pid % tiles) * rows
        return image.to(tl.int64), first_row, first_row * width

    @triton.jit
    def _row_basis(columns_ptr, m, row, width, l, kept):
        """Column basis [16, BM] of the tokens in one grid row of the tile, zero elsewhere."""
        j = m - row * width
        ok = (l < kept)[:, None] & ((j >= 0) & (j < width))[None, :]
        return tl.load(columns_ptr + l[:, None] * width + j[None, :], mask=ok, other=0.0)

    @triton.jit
    def _stack_ok(row, height, kept, l):
        """Which coefficients [16, 1] of a grid row exist."""
        return ((l < kept) & (row * kept + l < height * kept))[:, None]

    @triton.jit
    def _softmax3(hidden, ok, d):
        """Gates [BM] of the three experts from the logits at the end of each hidden row."""
        l0 = tl.load(hidden + 3 * d, mask=ok, other=0.0).to(tl.float32)
        l1 = tl.load(hidden + 3 * d + 1, mask=ok, other=0.0).to(tl.float32)
        l2 = tl.load(hidden + 3 * d + 2, mask=ok, other=0.0).to(tl.float32)
        top = tl.maximum(l0, tl.maximum(l1, l2))
        e0, e1, e2 = tl.exp(l0 - top), tl.exp(l1 - top), tl.exp(l2 - top)
        total = e0 + e1 + e2
        return e0 / total, e1 / total, e2 / total

    @triton.jit
    def _expand_rows(columns_ptr, filtered_ptr, image, first_row, height, width, kept, m,
                     BM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, rows):  # fmt: skip
        """Low-pass [BM, D] of experts two and three at the tokens of a tile."""
        e = tl.arange(0, D)
        low = tl.zeros([BM, D], tl.float32)
        high = tl.zeros([BM, D], tl.float32)
        for row in range(rows):
            for first in range(0, kept, 16):
                l = first + tl.arange(0, 16)
                basis = tl.trans(_row_basis(columns_ptr, m, row, width, l, kept))
                stack = filtered_ptr + (((image * height + first_row + row) * kept + l)[:, None] * (2 * D) + e[None, :])
                ok = _stack_ok(first_row + row, height, kept, l)
                low = tl.dot(basis, tl.load(stack, mask=ok, other=0.0), low, input_precision=PRECISION)
                high = tl.dot(basis, tl.load(stack + D, mask=ok, other=0.0), high, input_precision=PRECISION)
        return low, high

    @triton.jit
    def _project_kernel(
        x_ptr, enter_ptr, bias_ptr, hidden_ptr, by_row_ptr, columns_ptr,
        tokens, height, width, rows, tiles, kept, channels, d, x_batch_stride, x_token_stride, hidden_stride,
        BM: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """hidden = x enter^T (+ bias where no filter follows) and the row products of experts two and three."""
        image, first_row, first = _tile(tl.program_id(0), tokens, width, rows, tiles)
        m, e, banded = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, 2 * D)
        router = tl.arange(0, 16)
        n = first + m
        ok = (m < rows * width) & (n < tokens)
        unit = banded % D
        banded_row, banded_ok = (1 + banded // D) * d + unit, (unit < d)[None, :]
        dtype = enter_ptr.dtype.element_ty
        spatial = tl.zeros([BM, D], tl.float32)
        bands = tl.zeros([BM, 2 * D], tl.float32)
        logits = tl.zeros([BM, 16], tl.float32)
        # loop-invariant int32 offsets from a scalar pointer: pointer blocks would fill the registers
        k = tl.arange(0, BK)
        x_at = n[:, None] * x_token_stride + k[None, :]
        spatial_at = e[None, :] * channels + k[:, None]
        banded_at = banded_row[None, :] * channels + k[:, None]
        router_at = (3 * d + router)[None, :] * channels + k[:, None]
        x_ptr += image * x_batch_stride
        for start in range(0, channels, BK):
            k_ok = k < channels - start
            w_ok = k_ok[:, None]
            x = tl.load(x_ptr + start + x_at, mask=ok[:, None] & k_ok[None, :], other=0.0).to(dtype)
            w = enter_ptr + start
            spatial = dot(x, tl.load(w + spatial_at, mask=w_ok & (e < d)[None, :], other=0.0), spatial)
            bands = dot(x, tl.load(w + banded_at, mask=w_ok & banded_ok, other=0.0), bands)
            logits = dot(x, tl.load(w + router_at, mask=w_ok & (router < 3)[None, :], other=0.0), logits)
        spatial += tl.load(bias_ptr + e, mask=e < d, other=0.0).to(tl.float32)[None, :]
        logits += tl.load(bias_ptr + 3 * d + router, mask=router < 3, other=0.0).to(tl.float32)[None, :]
        hidden = hidden_ptr + (image * tokens + n)[:, None] * hidden_stride
        tl.store(hidden + e[None, :], spatial.to(dtype), mask=ok[:, None] & (e < d)[None, :])
        tl.store(hidden + banded_row[None, :], bands.to(dtype), mask=ok[:, None] & banded_ok)
        tl.store(hidden + 3 * d + router[None, :], logits.to(dtype), mask=ok[:, None] & (router < 3)[None, :])
        for row in range(rows):
            for start in range(0, kept, 16):
                l = start + tl.arange(0, 16)
                product = tl.dot(_row_basis(columns_ptr, m, row, width, l, kept), bands, input_precision=PRECISION)
                stack = ((image * height + first_row + row) * kept + l)[:, None] * (2 * D) + banded[None, :]
                tl.store(by_row_ptr + stack, product, mask=_stack_ok(first_row + row, height, kept, l))

    @triton.jit
    def _columns_kernel(
        by_row_ptr, filtered_ptr, even_ptr, odd_ptr, weights_ptr, height, kept,
        COUPLED: tl.constexpr, HP: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The product across grid rows, for one column frequency of one image and 16 channels."""
        start = tl.program_id(0).to(tl.int64) * height * kept * (2 * D)
        channel = tl.program_id(2) * 16 + tl.arange(0, 16)
        filter_column(
            by_row_ptr, filtered_ptr, even_ptr, odd_ptr, weights_ptr, start, tl.program_id(1), channel, channel < 2 * D,
            height, kept, 2 * D, COUPLED, HP, BH, PRECISION,
        )  # fmt: skip

    @triton.jit
    def _mix_kernel(
        x_ptr, y_ptr, hidden_ptr, filtered_ptr, columns_ptr, bias_ptr, leave_ptr, scale_ptr,
        tokens, height, width, rows, tiles, kept, channels, d, x_batch_stride, x_token_stride, hidden_stride,
        y_batch_stride, BM: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Completes hidden with the filtered experts, gates them, and y = x + scale * (mixed leave)."""
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        image, first_row, first = _tile(pid, tokens, width, rows, tiles)
        m, e = tl.arange(0, BM), tl.arange(0, D)
        n = first + m
        ok = (m < rows * width) & (n < tokens)
        narrow_ok = ok[:, None] & (e < d)[None, :]
        dtype = leave_ptr.dtype.element_ty
        low, high = _expand_rows(
            columns_ptr, filtered_ptr, image, first_row, height, width, kept, m, BM, D, PRECISION, rows
        )
        row_start = hidden_ptr + (image * tokens + n) * hidden_stride
        hidden = row_start[:, None] + e[None, :]
        low += tl.load(bias_ptr + d + e, mask=e < d, other=0.0).to(tl.float32)[None, :]
        high = tl.load(hidden + 2 * d, mask=narrow_ok, other=0.0).to(tl.float32) - high
        high += tl.load(bias_ptr + 2 * d + e, mask=e < d, other=0.0).to(tl.float32)[None, :]
        tl.store(hidden + d, low.to(dtype), mask=narrow_ok)
        tl.store(hidden + 2 * d, high.to(dtype), mask=narrow_ok)
        spatial = tl.load(hidden, mask=narrow_ok, other=0.0).to(tl.float32)
        gate0, gate1, gate2 = _softmax3(row_start, ok, d)
        scale = tl.load(scale_ptr).to(tl.float32)
        gate0, gate1, gate2 = gate0 * scale, gate1 * scale, gate2 * scale
        mixed0 = (tl.maximum(spatial, 0.0) * gate0[:, None]).to(dtype)
        mixed1 = (tl.maximum(low, 0.0) * gate1[:, None]).to(dtype)
        mixed2 = (tl.maximum(high, 0.0) * gate2[:, None]).to(dtype)
        x_ptr += image * x_batch_stride + n[:, None] * x_token_stride
        y_ptr += image * y_batch_stride + n[:, None] * channels
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            c_ok = c < channels
            w = leave_ptr + e[:, None] * channels + c[None, :]
            w_ok = (e < d)[:, None] & c_ok[None, :]
            bias = leave_ptr + 3 * d * channels + c
            x = tl.load(x_ptr + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
            y = dot(mixed0, tl.load(w, mask=w_ok, other=0.0), tl.zeros([BM, BC], tl.float32))
            y = dot(mixed1, tl.load(w + d * channels, mask=w_ok, other=0.0), y)
            y = dot(mixed2, tl.load(w + 2 * d * channels, mask=w_ok, other=0.0), y)
            y += gate0[:, None] * tl.load(bias, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            y += gate1[:, None] * tl.load(bias + channels, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            y += gate2[:, None] * tl.load(bias + 2 * channels, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            # last: a sum that began with its largest term would round every product to that term's unit
            y += x.to(tl.float32)
            tl.store(y_ptr + c[None, :], y.to(y_ptr.dtype.element_ty), mask=ok[:, None] & c_ok[None, :])

    @triton.jit
    def _expert_backward(dmixed, hidden, gate, dgate_bias, narrow_ok):
        """d hidden, gradient of the gate and gated activation of one expert; dmixed and hidden are [BM, D]."""
        hidden = tl.load(hidden, mask=narrow_ok, other=0.0).to(tl.float32)
        active = tl.maximum(hidden, 0.0)
        dgate = tl.sum(dmixed * active, axis=1) + dgate_bias
        return tl.where(hidden > 0, dmixed * gate[:, None], 0.0), dgate, active * gate[:, None]

    @triton.jit
    def _pick(logits, which: tl.constexpr):
        """Column ``which`` of [BM, 16]."""
        return tl.sum(tl.where(tl.arange(0, 16)[None, :] == which, logits, 0.0), axis=1)

    @triton.jit
    def _mix_backward_kernel(
        dy_ptr, leave_ptr, scale_ptr, hidden_ptr, dhidden_ptr, mixed_ptr, by_row_ptr, columns_ptr, sums_ptr,
        tokens, height, width, rows, tiles, kept, channels, d, dy_batch_stride, dy_token_stride, hidden_stride,
        BM: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """dy leave^T, then back through gates and activations; row products of what the filter takes next.

        sums [programs, 3d + 4]: over the tile's tokens, the gradients of the entering biases and of the scale.
        """
        pid = tl.program_id(0)
        image, first_row, first = _tile(pid, tokens, width, rows, tiles)
        m, e, router = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, 16)
        n = first + m
        ok = (m < rows * width) & (n < tokens)
        dtype = leave_ptr.dtype.element_ty
        d0 = tl.zeros([BM, D], tl.float32)
        d1 = tl.zeros([BM, D], tl.float32)
        d2 = tl.zeros([BM, D], tl.float32)
        dgates = tl.zeros([BM, 16], tl.float32)
        k = tl.arange(0, BK)
        dy_at = n[:, None] * dy_token_stride + k[None, :]
        w_at = e[None, :] * channels + k[:, None]
        router_at = (3 * d + router)[None, :] * channels + k[:, None]
        dy_ptr += image * dy_batch_stride
        for start in range(0, channels, BK):
            k_ok = k < channels - start
            dy = tl.load(dy_ptr + start + dy_at, mask=ok[:, None] & k_ok[None, :], other=0.0).to(dtype)
            w = leave_ptr + start
            w_ok = k_ok[:, None] & (e < d)[None, :]
            d0 = dot(dy, tl.load(w + w_at, mask=w_ok, other=0.0), d0)
            d1 = dot(dy, tl.load(w + d * channels + w_at, mask=w_ok, other=0.0), d1)
            d2 = dot(dy, tl.load(w + 2 * d * channels + w_at, mask=w_ok, other=0.0), d2)
            w_ok = k_ok[:, None] & (router < 3)[None, :]
            dgates = dot(dy, tl.load(w + router_at, mask=w_ok, other=0.0), dgates)
        at = image * tokens + n
        gate0, gate1, gate2 = _softmax3(hidden_ptr + at * hidden_stride, ok, d)
        at = at[:, None] * hidden_stride + e[None, :]
        narrow_ok = ok[:, None] & (e < d)[None, :]
        d0, dgate0, mixed0 = _expert_backward(d0, hidden_ptr + at, gate0, _pick(dgates, 0), narrow_ok)
        d1, dgate1, mixed1 = _expert_backward(d1, hidden_ptr + at + d, gate1, _pick(dgates, 1), narrow_ok)
        d2, dgate2, mixed2 = _expert_backward(d2, hidden_ptr + at + 2 * d, gate2, _pick(dgates, 2), narrow_ok)
        # <dy, mixture> of each token: the gradient of the scale, and the softmax's projection
        inner = gate0 * dgate0 + gate1 * dgate1 + gate2 * dgate2
        scale = tl.load(scale_ptr).to(tl.float32)
        d0, d1, d2 = d0 * scale, d1 * scale, d2 * scale
        dlogit0 = gate0 * (dgate0 - inner) * scale
        dlogit1 = gate1 * (dgate1 - inner) * scale
        dlogit2 = gate2 * (dgate2 - inner) * scale
        tl.store(dhidden_ptr + at, d0.to(dtype), mask=narrow_ok)
        tl.store(dhidden_ptr + at + d, d1.to(dtype), mask=narrow_ok)
        tl.store(dhidden_ptr + at + 2 * d, d2.to(dtype), mask=narrow_ok)
        tl.store(mixed_ptr + at, (mixed0 * scale).to(dtype), mask=narrow_ok)
        tl.store(mixed_ptr + at + d, (mixed1 * scale).to(dtype), mask=narrow_ok)
        tl.store(mixed_ptr + at + 2 * d, (mixed2 * scale).to(dtype), mask=narrow_ok)
        at = (image * tokens + n) * hidden_stride + 3 * d
        tl.store(dhidden_ptr + at, dlogit0.to(dtype), mask=ok)
        tl.store(dhidden_ptr + at + 1, dlogit1.to(dtype), mask=ok)
        tl.store(dhidden_ptr + at + 2, dlogit2.to(dtype), mask=ok)
        tl.store(mixed_ptr + at, (gate0 * scale).to(dtype), mask=ok)
        tl.store(mixed_ptr + at + 1, (gate1 * scale).to(dtype), mask=ok)
        tl.store(mixed_ptr + at + 2, (gate2 * scale).to(dtype), mask=ok)
        sums_ptr += pid * (3 * d + 4)
        tl.store(sums_ptr + e, tl.sum(d0, axis=0), mask=e < d)
        tl.store(sums_ptr + d + e, tl.sum(d1, axis=0), mask=e < d)
        tl.store(sums_ptr + 2 * d + e, tl.sum(d2, axis=0), mask=e < d)
        tl.store(sums_ptr + 3 * d, tl.sum(tl.where(ok, dlogit0, 0.0), axis=0))
        tl.store(sums_ptr + 3 * d + 1, tl.sum(tl.where(ok, dlogit1, 0.0), axis=0))
        tl.store(sums_ptr + 3 * d + 2, tl.sum(tl.where(ok, dlogit2, 0.0), axis=0))
        tl.store(sums_ptr + 3 * d + 3, tl.sum(tl.where(ok, inner, 0.0), axis=0))
        for row in range(rows):
            for start in range(0, kept, 16):
                l = start + tl.arange(0, 16)
                basis = _row_basis(columns_ptr, m, row, width, l, kept)
                stack = by_row_ptr + (((image * height + first_row + row) * kept + l)[:, None] * (2 * D) + e[None, :])
                stack_ok = _stack_ok(first_row + row, height, kept, l)
                tl.store(stack, tl.dot(basis, d1, input_precision=PRECISION), mask=stack_ok)
                tl.store(stack + D, tl.dot(basis, d2, input_precision=PRECISION), mask=stack_ok)

    @triton.jit
    def _input_gradient_kernel(
        dy_ptr, dx_ptr, dhidden_ptr, filtered_ptr, columns_ptr, enter_ptr,
        tokens, height, width, rows, tiles, kept, channels, d, dy_batch_stride, dy_token_stride, hidden_stride,
        dx_batch_stride, BM: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
        WANTS_X: tl.constexpr,
    ):  # fmt: skip
        """Completes dhidden with the filtered experts, and dx = dy + dhidden enter."""
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        image, first_row, first = _tile(pid, tokens, width, rows, tiles)
        m, e, router = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, 16)
        n = first + m
        ok = (m < rows * width) & (n < tokens)
        narrow_ok = ok[:, None] & (e < d)[None, :]
        dtype = enter_ptr.dtype.element_ty
        low, high = _expand_rows(
            columns_ptr, filtered_ptr, image, first_row, height, width, kept, m, BM, D, PRECISION, rows
        )
        row_start = dhidden_ptr + (image * tokens + n)[:, None] * hidden_stride
        dhidden = row_start + e[None, :]
        high = tl.load(dhidden + 2 * d, mask=narrow_ok, other=0.0).to(tl.float32) - high
        low, high = low.to(dtype), high.to(dtype)
        tl.store(dhidden + d, low, mask=narrow_ok)
        tl.store(dhidden + 2 * d, high, mask=narrow_ok)
        if WANTS_X:
            spatial = tl.load(dhidden, mask=narrow_ok, other=0.0)
            logits = tl.load(row_start + 3 * d + router[None, :], mask=ok[:, None] & (router < 3)[None, :], other=0.0)
            dy_ptr += image * dy_batch_stride + n[:, None] * dy_token_stride
            dx_ptr += image * dx_batch_stride + n[:, None] * channels
            for start in range(0, channels, BC):
                c = start + tl.arange(0, BC)
                c_ok = (c < channels)[None, :]
                w = enter_ptr + e[:, None] * channels + c[None, :]
                w_ok = (e < d)[:, None] & c_ok
                dy = tl.load(dy_ptr + c[None, :], mask=ok[:, None] & c_ok, other=0.0)
                dx = dot(spatial, tl.load(w, mask=w_ok, other=0.0), tl.zeros([BM, BC], tl.float32))
                dx = dot(low, tl.load(w + d * channels, mask=w_ok, other=0.0), dx)
                dx = dot(high, tl.load(w + 2 * d * channels, mask=w_ok, other=0.0), dx)
                w = enter_ptr + (3 * d + router)[:, None] * channels + c[None, :]
                dx = dot(logits, tl.load(w, mask=(router < 3)[:, None] & c_ok, other=0.0), dx) + dy.to(tl.float32)
                tl.store(dx_ptr + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=ok[:, None] & c_ok)


class Tiling(NamedTuple):
    """Sizes that forward and backward launches share."""

    sizes: tuple[int, ...]  # tokens, height, width, rows, tiles, kept, channels, d
    programs: int
    depth: int  # channels per step of the projections
    meta: dict[str, int | str]


def tile(x: Tensor, grid: tuple[int, int], kept: GridFilter, enter: Tensor) -> Tiling:
    """Whole grid rows per tile: small tiles fill the GPU at small batches, larger ones re-read the weights less."""
    batch, tokens, channels = x.shape
    height, width = grid
    d = enter.shape[0] // 3 - 1
    block = max(pad(width), 32 if batch * tokens < 16384 or x.dtype == torch.float32 else 64)
    rows = min(block // width, height)
    tiles = triton.cdiv(height, rows)
    count = len(kept.columns)
    meta = {"BM": block, "D": pad(d), "PRECISION": filter_precision(enter.dtype)}
    # the backward kernel holds nine [BM, D] blocks of float32
    wide = d > 32 or enter.dtype == torch.float32
    meta["num_warps"] = max(8, block * pad(d) // 256) if wide else max(4, block * pad(d) // 512)
    return Tiling(
        (tokens, height, width, rows, tiles, count, channels, d),
        batch * tiles,
        32 if d > 32 else dot_block(enter.dtype),
        meta,
    )


def _filter_rows(by_row: Tensor, kept: GridFilter, at: Tiling) -> Tensor:
    filtered = torch.empty_like(by_row)
    batch, height, count, channels = by_row.shape
    if by_row.numel():
        _columns_kernel[(batch, count, channels // 16)](
            by_row, filtered, kept.even, kept.odd, kept.column_weights, height, count,
            COUPLED=kept.coupled, HP=pad(height), BH=min(pad(height), 32), D=channels // 2,
            PRECISION=at.meta["PRECISION"], num_warps=4 if height <= 64 else 8,
        )  # fmt: skip
    return filtered


def hidden_like(x: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """[B, N, rank] with rows padded to a multiple of 16, so that vector loads stay aligned."""
    return torch.empty(*x.shape[:2], -(-rank // 16) * 16, dtype=dtype, device=x.device)[..., :rank]


def forward(
    x: Tensor, enter: Tensor, bias: Tensor, leave: Tensor, scale: Tensor, kept: GridFilter, grid: tuple[int, int],
    y: Tensor,
) -> Tensor:  # fmt: skip
    """Fills y [B, N, C], rows of any batch stride, and returns hidden [B, N, 3d+3] as the reference keeps it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    at = tile(x, grid, kept, enter)
    hidden = hidden_like(x, len(enter), enter.dtype)
    by_row = x.new_empty(x.shape[0], grid[0], len(kept.columns), 2 * at.meta["D"], dtype=torch.float32)
    strides = (x.stride(0), x.stride(1), hidden.stride(1))
    _project_kernel[(at.programs,)](
        x, enter, bias, hidden, by_row, kept.columns, *at.sizes, *strides, BK=at.depth, **at.meta
    )
    filtered = _filter_rows(by_row, kept, at)
    _mix_kernel[(at.programs,)](
        x, y, hidden, filtered, kept.columns, bias, leave, scale, *at.sizes, *strides, y.stride(0),
        BC=max(at.depth, 32), **at.meta,
    )  # fmt: skip
    return hidden


def backward(
    x: Tensor, hidden: Tensor, enter: Tensor, leave: Tensor, scale: Tensor, kept: GridFilter, grid: tuple[int, int],
    dy: Tensor, dx: Tensor | None, dtype: torch.dtype, wants_enter: bool, wants_leave: bool, wants_cutoff: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Fills dx where one is given; denter, dbias, dleave, dscale, and the gradient of hidden before the filter.

    ``dtype`` is that of the weights' gradients; the last is for a learned cutoff.
    """
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dy))
    at = tile(x, grid, kept, enter)
    dhidden, mixed = (hidden_like(x, len(enter), enter.dtype) for _ in range(2))
    by_row = x.new_empty(x.shape[0], grid[0], len(kept.columns), 2 * at.meta["D"], dtype=torch.float32)
    sums = x.new_empty(at.programs, len(enter) + 1, dtype=torch.float32)
    strides = (dy.stride(0), dy.stride(1), hidden.stride(1))
    _mix_backward_kernel[(at.programs,)](
        dy, leave, scale, hidden, dhidden, mixed, by_row, kept.columns, sums, *at.sizes, *strides,
        BK=at.depth, **at.meta,
    )  # fmt: skip
    sums = sums.sum(0)
    unfiltered = dhidden.clone() if wants_cutoff else None
    wants_x = dx is not None
    if wants_x or wants_enter:
        filtered = _filter_rows(by_row, kept, at)
        _input_gradient_kernel[(at.programs,)](
            dy, dx if wants_x else dhidden, dhidden, filtered, kept.columns, enter, *at.sizes, *strides,
            dx.stride(0) if wants_x else 0, BC=max(at.depth, 32), WANTS_X=wants_x, **at.meta,
        )  # fmt: skip
    denter = weight_gradient(dhidden, x, dtype) if wants_enter else None
    dleave = weight_gradient(mixed, dy, dtype) if wants_leave else None
    return denter, sums[:-1].to(dtype), dleave, sums[-1].to(scale.dtype), unfiltered
