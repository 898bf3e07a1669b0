"""Fisher mass of a linear map: per-sample weight gradients, squared and summed over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ._support import HAS_TRITON, accumulation_dtype, define, dot_block, pick_backend, without_autocast

WORKSPACE = 1 << 20
"""Elements that the per-sample gradients formed at once may take, unless a single one is larger."""


def sum_squared_gradients_reference(inputs: Tensor, grads: Tensor, *, reduce: bool = False) -> Tensor:
    """Plain PyTorch, a few samples at once; for the sum, T x T Gram matrices where these are cheaper than gradients."""
    dtype = accumulation_dtype(inputs.dtype)
    samples, tokens, width, out = *inputs.shape, grads.shape[2]
    by_gram = reduce and tokens * (width + out) < width * out
    total = torch.zeros(() if reduce else (out, width), dtype=dtype, device=inputs.device)
    size = max(1, WORKSPACE // max(1, 2 * tokens**2 if by_gram else width * out))
    for start in range(0, samples, size):
        a, g = (part[start : start + size].to(dtype) for part in (inputs, grads))
        if by_gram:
            total += torch.sum((a @ a.mT).mul_(g @ g.mT))
            continue
        gradients = g.mT @ a  # [b, out, in]
        if reduce:
            total += torch.dot(gradients.flatten(), gradients.flatten())
        else:
            total += gradients.square_().sum(0)
    return total


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._support import dot

    @triton.jit
    def _sum_squared_kernel(
        inputs_ptr, grads_ptr, partial_ptr, samples, samples_per_part, tokens, width, out,
        inputs_batch_stride, inputs_token_stride, grads_batch_stride, grads_token_stride,
        REDUCE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """One tile of the weight for a few samples: each sample's gradient lives in registers until it is squared."""
        o, i = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BI + tl.arange(0, BI)
        part = tl.program_id(2)
        o_ok, i_ok = o < out, i < width
        total = tl.zeros([BO, BI], tl.float32)
        for step in range(samples_per_part):
            sample = part.to(tl.int64) * samples_per_part + step
            gradient = tl.zeros([BO, BI], tl.float32)
            for start in range(0, tokens, BT):
                t = start + tl.arange(0, BT)
                t_ok = (t < tokens) & (sample + t * 0 < samples)
                g = grads_ptr + sample * grads_batch_stride + t[None, :] * grads_token_stride + o[:, None]
                a = inputs_ptr + sample * inputs_batch_stride + t[:, None] * inputs_token_stride + i[None, :]
                g = tl.load(g, mask=t_ok[None, :] & o_ok[:, None], other=0.0)
                a = tl.load(a, mask=t_ok[:, None] & i_ok[None, :], other=0.0)
                gradient = dot(g.to(inputs_ptr.dtype.element_ty), a, gradient)
            total += gradient * gradient
        if REDUCE:
            program = (part * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
            tl.store(partial_ptr + program, tl.sum(tl.sum(total, axis=1), axis=0))
        else:
            at = (part.to(tl.int64) * out + o)[:, None] * width + i[None, :]
            tl.store(partial_ptr + at, total, mask=o_ok[:, None] & i_ok[None, :])


def _sum_squared_triton(inputs: Tensor, grads: Tensor, reduce: bool) -> Tensor:
    inputs, grads = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs, grads))
    samples, tokens, width = inputs.shape
    out = grads.shape[2]
    block = 32 if inputs.dtype == torch.float32 else 64
    tiles = triton.cdiv(out, block), triton.cdiv(width, block)
    # the diagonal may take twice the weight's memory, no more; partial sums of the scalar cost nothing
    parts = samples if reduce else min(samples, 2)
    shape = (parts * tiles[0] * tiles[1],) if reduce else (parts, out, width)
    partial = torch.empty(shape, dtype=torch.float32, device=inputs.device)
    _sum_squared_kernel[(*tiles, parts)](
        inputs, grads, partial, samples, triton.cdiv(samples, parts), tokens, width, out,
        inputs.stride(0), inputs.stride(1), grads.stride(0), grads.stride(1),
        REDUCE=reduce, BO=block, BI=block, BT=dot_block(inputs.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial.sum(0)


def _run(inputs: Tensor, grads: Tensor, reduce: bool, backend: str) -> Tensor:
    with torch.no_grad(), without_autocast(inputs):
        if backend == "triton":
            return _sum_squared_triton(inputs, grads, reduce)
        return sum_squared_gradients_reference(inputs, grads, reduce=reduce)


def _fake(inputs: Tensor, grads: Tensor, reduce: bool, backend: str) -> Tensor:
    dtype = accumulation_dtype(inputs.dtype)
    return inputs.new_empty(() if reduce else (grads.shape[2], inputs.shape[2]), dtype=dtype)


_sum_squared = define(
    "fused_sum_squared_gradients(Tensor inputs, Tensor grads, bool reduce, str backend) -> Tensor", _run, _fake
)


@torch.no_grad()
def sum_squared_gradients(inputs: Tensor, grads: Tensor, *, reduce: bool = False, backend: str = "auto") -> Tensor:
    """Sum over samples of the elementwise square of each sample's own weight gradient.

    Args:
        inputs: [B, T, in], what went into the linear map; float32, bfloat16, float16 (float64 in PyTorch only).
        grads: [B, T, out], gradient of its output, from the *sum* of per-sample losses (a mean would be off by B^2).
        reduce: sum over the weight's elements as well; nothing of the weight's size is then written by the kernel.
        backend: "auto", "torch" or "triton".

    Returns:
        ``sum_b (grads_b^T inputs_b)^2``: [out, in], or [] with ``reduce``; float32 (float64 for float64); no gradient.

    Raises:
        ValueError: B or T differ.
    """
    if inputs.ndim != 3 or grads.ndim != 3 or inputs.shape[:2] != grads.shape[:2]:
        raise ValueError(
            f"sum_squared_gradients: inputs {tuple(inputs.shape)} and grads {tuple(grads.shape)} "
            "must be [B, T, in] and [B, T, out]"
        )
    chosen = pick_backend("sum_squared_gradients", backend, inputs=inputs, grads=grads)
    return _sum_squared(inputs, grads, reduce, chosen if inputs.numel() and grads.numel() else "torch")


@torch.no_grad()
def sum_squared_bias_gradients(grads: Tensor, *, reduce: bool = False) -> Tensor:
    """The same for a bias: ``sum_b (sum_t grads_bt)^2``, [out] or []; for a scalar weight pass grads [B, T, 1].

    Args:
        grads: [B, T, out], from the sum of per-sample losses.
    """
    squared = grads.sum(1, dtype=accumulation_dtype(grads.dtype)).square_()
    return squared.sum() if reduce else squared.sum(0)
