"""narrow^T wide over all tokens: the weight gradient of every narrow projection, in fixed-order partial sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ._support import HAS_TRITON, dot_block, pad

PROGRAMS, LEAST_TOKENS = 512, 256
"""Programs of a launch, some four on each of the 132 multiprocessors of an H100, so that loads of one hide behind
products of another; and tokens that a part must have. Constants, so that the order of a sum depends on its shape alone.
(8 parts at most, one program on each: 0.115 ms a launch at 8 x 4096 x 1024 on an H100, of which bytes take 0.025. What
these give is not measured.)"""

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._support import dot

    @triton.jit
    def _weight_gradient_kernel(
        narrow_ptr, wide_ptr, partial_ptr, images, tokens, tokens_per_part, rank, channels,
        narrow_stride, wide_batch_stride, wide_token_stride,
        RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(1)
        channel, r = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, RP)
        channel_ok, rank_ok = channel < channels, r < rank
        total = tl.zeros([RP, BC], tl.float32)
        first = part.to(tl.int64) * tokens_per_part
        for step in range(0, tokens_per_part, BM):
            m = step + tl.arange(0, BM)
            ok = (m < tokens_per_part) & (first + m < images * tokens)
            m += first
            a = narrow_ptr + m[None, :] * narrow_stride + r[:, None]
            at = m // tokens * wide_batch_stride + m % tokens * wide_token_stride
            b = wide_ptr + at[:, None] + channel[None, :]
            a = tl.load(a, mask=rank_ok[:, None] & ok[None, :], other=0.0)
            b = tl.load(b, mask=ok[:, None] & channel_ok[None, :], other=0.0)
            total = dot(a, b.to(narrow_ptr.dtype.element_ty), total)
        at = (part * rank + r)[:, None].to(tl.int64) * channels + channel[None, :]
        tl.store(partial_ptr + at, total, mask=rank_ok[:, None] & channel_ok[None, :])


def weight_gradient(narrow: Tensor, wide: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """[R, C] = sum over tokens of narrow [B, N, R] times wide [B, N, C]; or its transpose [C, R], contiguous too.

    Args:
        narrow: contiguous but for a padded row, so that token (b, n) starts at ``(b * N + n) * narrow.stride(1)``.
        wide: last stride 1.
        dtype: of the result.
    """
    images, tokens, rank = narrow.shape
    channels = wide.shape[-1]
    block = 64 if rank <= 128 else 32
    blocks = triton.cdiv(channels, block)
    parts = max(1, min(PROGRAMS // blocks, images * tokens // LEAST_TOKENS))
    partial = torch.empty(parts, rank, channels, dtype=torch.float32, device=wide.device)
    _weight_gradient_kernel[(blocks, parts)](
        narrow, wide, partial, images, tokens, triton.cdiv(images * tokens, parts), rank, channels,
        narrow.stride(1), wide.stride(0), wide.stride(1),
        RP=pad(rank), BM=min(32 if rank > 128 else 64, dot_block(narrow.dtype)), BC=block,
        num_warps=4 if rank <= 64 and narrow.dtype != torch.float32 else 8, num_stages=3,
    )  # fmt: skip
    if transposed:
        total = partial.new_empty(channels, rank)
        torch.sum(partial, 0, out=total.mT)
    else:
        total = partial.sum(0)
    return total.to(dtype)
