"""Triton kernels of the low-rank maps: one launch forward, one backward, plus fixed-order sums for the weights.

A program keeps the narrow activations of its tokens in registers, between the pass over x and the one over the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._support import HAS_TRITON, dot_block, pad

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._support import dot
    from ._weight_gradient import weight_gradient

    @triton.jit
    def _gelu(pre):
        return 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))

    @triton.jit
    def _gelu_backward(pre):
        density = tl.exp(-0.5 * pre * pre) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)) + pre * density

    @triton.jit
    def _low_rank_kernel(
        x_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, base_ptr, y_ptr, pre_ptr, scale,
        tokens, channels, rank, out, x_stride, base_stride, y_stride, pre_stride, part_offset,
        HAS_BASE: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
        BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr,
    ):  # fmt: skip
        """One part (axis 1: one map, or q and v) of one block of tokens; the parts share x through L2."""
        part = tl.program_id(1)
        scale = tl.cast(scale, tl.float32)  # whatever number came
        m, r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, RP)
        ok, rank_ok = m < tokens, r < rank
        down_ptr += part * rank * channels
        pre = tl.zeros([BM, RP], tl.float32)
        for start in range(0, channels, BK):
            c = start + tl.arange(0, BK)
            c_ok = c < channels
            x = tl.load(x_ptr + m[:, None] * x_stride + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
            down = down_ptr + r[None, :] * channels + c[:, None]
            pre = dot(x, tl.load(down, mask=c_ok[:, None] & rank_ok[None, :], other=0.0), pre)
        if HAS_DOWN_BIAS:
            pre += tl.load(down_bias_ptr + r, mask=rank_ok, other=0.0).to(tl.float32)[None, :]
        pre_at = pre_ptr + m[:, None] * pre_stride + (part * rank + r)[None, :]
        tl.store(pre_at, pre.to(pre_ptr.dtype.element_ty), mask=ok[:, None] & rank_ok[None, :])
        if ACTIVATION == "relu":
            pre = tl.maximum(pre, 0.0)
        if ACTIVATION == "gelu":
            pre = _gelu(pre)
        hidden = (pre * scale).to(up_ptr.dtype.element_ty)
        up_ptr += part * out * rank
        for start in range(0, out, BC):
            c = start + tl.arange(0, BC)
            c_ok = c < out
            at_ok = ok[:, None] & c_ok[None, :]
            if HAS_BASE:
                base = base_ptr + m[:, None] * base_stride + (part * part_offset + c)[None, :]
                base = tl.load(base, mask=at_ok, other=0.0)
            up = tl.load(up_ptr + c[None, :] * rank + r[:, None], mask=rank_ok[:, None] & c_ok[None, :], other=0.0)
            y = dot(hidden, up, tl.zeros([BM, BC], tl.float32))
            if HAS_UP_BIAS:
                y += scale * tl.load(up_bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            # last: a sum that began with its largest term would round every product to that term's unit
            if HAS_BASE:
                y += base.to(tl.float32)
            y_at = y_ptr + m[:, None] * y_stride + (part * part_offset + c)[None, :]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=at_ok)

    @triton.jit
    def _part_backward(
        dy_ptr, up_ptr, pre_ptr, dpre_ptr, hidden_ptr, scale, m, ok, rank, out, dy_stride, pre_stride,
        ACTIVATION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the pre-activation of one part [BM, RP]; stores it and the scaled activation for the weights."""
        r = tl.arange(0, RP)
        dpre = tl.zeros([BM, RP], tl.float32)
        for start in range(0, out, BC):
            c = start + tl.arange(0, BC)
            c_ok = c < out
            dy = tl.load(dy_ptr + m[:, None] * dy_stride + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
            up = tl.load(up_ptr + c[:, None] * rank + r[None, :], mask=c_ok[:, None] & (r < rank)[None, :], other=0.0)
            dpre = dot(dy, up, dpre)
        dpre *= scale
        at = m[:, None] * pre_stride + r[None, :]
        at_ok = ok[:, None] & (r < rank)[None, :]
        pre = tl.load(pre_ptr + at, mask=at_ok, other=0.0).to(tl.float32)
        hidden = pre
        if ACTIVATION == "relu":
            dpre = tl.where(pre > 0, dpre, 0.0)
            hidden = tl.maximum(pre, 0.0)
        if ACTIVATION == "gelu":
            dpre *= _gelu_backward(pre)
            hidden = _gelu(pre)
        dpre = dpre.to(up_ptr.dtype.element_ty)
        tl.store(dpre_ptr + at, dpre, mask=at_ok)
        tl.store(hidden_ptr + at, (hidden * scale).to(up_ptr.dtype.element_ty), mask=at_ok)
        return dpre

    @triton.jit
    def _low_rank_backward_kernel(
        dy_ptr, down_ptr, up_ptr, pre_ptr, dpre_ptr, hidden_ptr, dx_ptr, scale,
        tokens, channels, rank, out, dy_stride, pre_stride, part_offset,
        WANTS_X: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
        BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr,
    ):  # fmt: skip
        scale = tl.cast(scale, tl.float32)  # whatever number came
        m, r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, RP)
        ok, rank_ok = m < tokens, r < rank
        first = _part_backward(
            dy_ptr, up_ptr, pre_ptr, dpre_ptr, hidden_ptr, scale, m, ok, rank, out, dy_stride, pre_stride,
            ACTIVATION, BM, BK, RP,
        )  # fmt: skip
        if PARTS == 2:
            second = _part_backward(
                dy_ptr + part_offset, up_ptr + out * rank, pre_ptr + rank, dpre_ptr + rank, hidden_ptr + rank,
                scale, m, ok, rank, out, dy_stride, pre_stride, ACTIVATION, BM, BK, RP,
            )  # fmt: skip
        if WANTS_X:
            for start in range(0, channels, BC):
                c = start + tl.arange(0, BC)
                c_ok = c < channels
                down = down_ptr + r[:, None] * channels + c[None, :]
                down_ok = rank_ok[:, None] & c_ok[None, :]
                dx = dot(first, tl.load(down, mask=down_ok, other=0.0), tl.zeros([BM, BC], tl.float32))
                if PARTS == 2:
                    dx = dot(second, tl.load(down + rank * channels, mask=down_ok, other=0.0), dx)
                at = m[:, None] * channels + c[None, :]
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok[:, None] & c_ok[None, :])


def _tiles(rank: int, dtype: torch.dtype) -> dict[str, int]:
    single = dtype == torch.float32
    step = min(32 if rank > 128 else 64, dot_block(dtype))
    return {
        "BM": 16 if single and rank > 128 else 32 if single or rank > 128 else 64,
        "BK": step,
        "BC": step,
        "RP": pad(rank),
        "num_warps": 4 if rank <= 64 and not single else 8,
    }


def _launch_forward(x, down, up, base, down_bias, up_bias, y, activation, scale, part_offset=0) -> Tensor:
    """Writes y [M, ..] and returns the pre-activation [M, parts * r]; down [parts * r, C], up [parts, out, r]."""
    parts, out, rank = up.shape
    pre = torch.empty(x.shape[0], parts * rank, dtype=down.dtype, device=x.device)
    tiles = _tiles(rank, down.dtype)
    _low_rank_kernel[(triton.cdiv(x.shape[0], tiles["BM"]), parts)](
        x, down, down_bias, up, up_bias, base, y, pre, scale, x.shape[0], x.shape[1], rank, out,
        x.stride(0), 0 if base is None else base.stride(0), y.stride(0), pre.stride(0), part_offset,
        HAS_BASE=base is not None, HAS_DOWN_BIAS=down_bias is not None, HAS_UP_BIAS=up_bias is not None,
        ACTIVATION=activation or "none", **tiles,
    )  # fmt: skip
    return pre


def _launch_backward(x, pre, down, up, dy, activation, scale, wants_x, part_offset=0):
    """dx [M, C] or None, dpre and the scaled activation, both [M, parts * r]."""
    parts, out, rank = up.shape
    tiles = _tiles(rank, down.dtype)
    dpre, hidden = torch.empty_like(pre), torch.empty_like(pre)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
    _low_rank_backward_kernel[(triton.cdiv(x.shape[0], tiles["BM"]),)](
        dy, down, up, pre, dpre, hidden, dx if wants_x else dpre, scale, x.shape[0], x.shape[1], rank, out,
        dy.stride(0), pre.stride(0), part_offset, WANTS_X=wants_x, PARTS=parts, ACTIVATION=activation or "none",
        **tiles,
    )  # fmt: skip
    return dx, dpre, hidden


def forward(
    x: Tensor, down: Tensor, up: Tensor, base: Tensor | None, down_bias: Tensor | None, up_bias: Tensor | None,
    activation: str | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [M, out] and the pre-activation [M, r], of x [M, C] and base [M, out] with unit stride in a row."""
    dtype = x.dtype if base is None else base.dtype
    y = torch.empty(x.shape[0], up.shape[0], dtype=dtype, device=x.device)
    return y, _launch_forward(x, down, up[None], base, down_bias, up_bias, y, activation, scale)


def backward(
    x: Tensor, pre: Tensor, down: Tensor, up: Tensor, dy: Tensor, activation: str | None, scale: float,
    dtypes: tuple[torch.dtype, torch.dtype], wants_x: bool, wants_down: bool, wants_up: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, ddown and dup in ``dtypes``, and the gradient of the pre-activation [M, r]."""
    dx, dpre, hidden = _launch_backward(x, pre, down, up[None], dy, activation, scale, wants_x)
    ddown = weight_gradient(dpre[None], x[None], dtypes[0]) if wants_down else None
    dup = weight_gradient(hidden[None], dy[None], dtypes[1], transposed=True) if wants_up else None
    return dx, ddown, dup, dpre


def forward_qv(x: Tensor, down: Tensor, up: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """Adds to q and v of qkv [M, 3D] in place, by down [2r, C] and up [2, D, r]; the pre-activation [M, 2r]."""
    return _launch_forward(x, down, up, qkv, None, None, qkv, None, scale, 2 * up.shape[1])


def backward_qv(
    x: Tensor, pre: Tensor, down: Tensor, up: Tensor, dqkv: Tensor, scale: float, dtype: torch.dtype,
    wants_x: bool, wants_down: bool, wants_up: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, d [down_q; down_v] [2r, C] and d [up_q, up_v] [2, D, r]."""
    _, width, rank = up.shape
    dx, dpre, hidden = _launch_backward(x, pre, down, up, dqkv, None, scale, wants_x, 2 * width)
    ddown = weight_gradient(dpre[None], x[None], dtype) if wants_down else None
    dup = None
    if wants_up:
        parts = ((hidden[:, :rank], dqkv[:, :width]), (hidden[:, rank:], dqkv[:, 2 * width :]))
        dup = torch.stack([weight_gradient(narrow[None], dy[None], dtype, transposed=True) for narrow, dy in parts])
    return dx, ddown, dup
