"""A residual sum and the layer norm behind it in one pass over the tokens, forward and backward.

Under autocast PyTorch runs them as four kernels (scale, add, norm, cast), and five backward, that move 32 and 46 bytes
an element of a float32 stream with a bfloat16 branch; one kernel moves 12 and 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._support import HAS_TRITON, compute_dtype, is_traced, pick_backend, refuse_second_derivatives

MAX_CHANNELS = 8192
"""A program holds a whole token in registers."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _standardised(x, ok, channels, eps):
        """Token with mean 0 and variance 1, zero where it has no channel, and what it was divided by, inverted."""
        centred = tl.where(ok, x - tl.sum(x, 0) / channels, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / channels + eps)
        return centred * inverse, inverse

    @triton.jit
    def _residual_norm_kernel(
        x_ptr, branch_ptr, scale_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, channels, eps,
        HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
        BC: tl.constexpr,
    ):  # fmt: skip
        """One token: y = x + scale * branch, h = norm(y)."""
        c = tl.arange(0, BC)
        ok = c < channels
        at = tl.program_id(0).to(tl.int64) * channels + c
        x = tl.load(x_ptr + at, mask=ok, other=0.0)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + at, mask=ok, other=0.0).to(tl.float32)
            if HAS_SCALE:
                branch *= tl.load(scale_ptr + c, mask=ok, other=0.0)
            x += branch
            tl.store(y_ptr + at, x, mask=ok)
        h, _ = _standardised(x, ok, channels, tl.cast(eps, tl.float32))
        if HAS_WEIGHT:
            h *= tl.load(weight_ptr + c, mask=ok, other=0.0)
        if HAS_BIAS:
            h += tl.load(bias_ptr + c, mask=ok, other=0.0)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _residual_norm_backward_kernel(
        y_ptr, dy_ptr, dh_ptr, scale_ptr, weight_ptr, dx_ptr, dbranch_ptr, channels, eps,
        HAS_DY: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
        WANTS_X: tl.constexpr, WANTS_BRANCH: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """One token; what the norm knew of it is found again, for that moves no byte."""
        c = tl.arange(0, BC)
        ok = c < channels
        at = tl.program_id(0).to(tl.int64) * channels + c
        h, inverse = _standardised(tl.load(y_ptr + at, mask=ok, other=0.0), ok, channels, tl.cast(eps, tl.float32))
        dh = tl.load(dh_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            dh *= tl.load(weight_ptr + c, mask=ok, other=0.0)
        dx = (dh - tl.sum(dh, 0) / channels - h * (tl.sum(dh * h, 0) / channels)) * inverse
        if HAS_DY:
            dx += tl.load(dy_ptr + at, mask=ok, other=0.0)
        if WANTS_X:
            tl.store(dx_ptr + at, dx, mask=ok)
        if WANTS_BRANCH:
            if HAS_SCALE:
                dx *= tl.load(scale_ptr + c, mask=ok, other=0.0)
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=ok)


def _options(channels: int) -> dict[str, int | bool]:
    """Without fused multiply-add a sum of residuals is PyTorch's to the last bit."""
    block = 1 << max(channels - 1, 0).bit_length()
    return {"BC": block, "num_warps": min(max(block // 256, 1), 16), "enable_fp_fusion": False}


def _forward(x, branch, scale, weight, bias, eps, dtype):
    """y, or x where there is no branch, and h."""
    y = x if branch is None else torch.empty_like(x)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    _residual_norm_kernel[(x.numel() // x.shape[-1],)](
        x, branch, scale, weight, bias, y, h, x.shape[-1], eps,
        HAS_BRANCH=branch is not None, HAS_SCALE=scale is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **_options(x.shape[-1]),
    )  # fmt: skip
    return y, h


def _backward(y, dy, dh, scale, weight, eps, branch_dtype, wants_x, wants_branch):
    """dx and the gradient of the branch; None where nobody wants one."""
    dx = torch.empty_like(y) if wants_x else None
    dbranch = torch.empty(y.shape, dtype=branch_dtype, device=y.device) if wants_branch else None
    _residual_norm_backward_kernel[(y.numel() // y.shape[-1],)](
        y, dy, dh, scale, weight, dx, dbranch, y.shape[-1], eps,
        HAS_DY=dy is not None, HAS_SCALE=scale is not None, HAS_WEIGHT=weight is not None,
        WANTS_X=wants_x, WANTS_BRANCH=wants_branch, **_options(y.shape[-1]),
    )  # fmt: skip
    return dx, dbranch


class _ResidualNorm(torch.autograd.Function):
    """Keeps y alone."""

    @staticmethod
    def forward(ctx, x, branch, scale, weight, bias, eps, dtype):
        y, h = _forward(x, branch, scale, weight, bias, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, scale, weight)
        ctx.eps, ctx.branch_dtype = eps, None if branch is None else branch.dtype
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        refuse_second_derivatives("residual_norm")
        y, scale, weight = ctx.saved_tensors
        wants_x, wants_branch = ctx.needs_input_grad[:2]
        if dh is None and dy is not None:  # nobody read h
            dbranch = (dy if scale is None else dy * scale).to(ctx.branch_dtype) if wants_branch else None
            return dy if wants_x else None, dbranch, None, None, None, None, None
        dx = dbranch = None
        if dh is not None:
            dy, dh = (None if grad is None else grad.contiguous() for grad in (dy, dh))
            dx, dbranch = _backward(y, dy, dh, scale, weight, ctx.eps, ctx.branch_dtype, wants_x, wants_branch)
        return dx, dbranch, None, None, None, None, None


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``y = x + scale * branch`` and the layer norm of y over its last axis.

    Args:
        x: [..., C]; float32 in Triton.
        branch: as x, of any floating dtype; None: y is x.
        scale, weight, bias: [C]; no gradient of theirs is computed in Triton.
        eps: added to the variance.
        backend: "auto", "torch" or "triton".

    Returns:
        y in the dtype of x, the sum as PyTorch rounds it, and h [..., C] in that of products (autocast's where it is
        on).
    """
    weights = {name: w for name, w in (("scale", scale), ("weight", weight), ("bias", bias)) if w is not None}
    limits = [f"{name} learns" for name, w in weights.items() if w.requires_grad and torch.is_grad_enabled()]
    limits += [f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"] if x.shape[-1] > MAX_CHANNELS else []
    chosen = pick_backend("residual_norm", backend, (torch.float32,), limits, x=x, **weights)
    if branch is not None and chosen == "triton":
        chosen = pick_backend("residual_norm", backend, branch=branch)
    if chosen == "torch" or is_traced(x) or not x.numel():  # a compiler fuses the formula by itself
        return _plain(x, branch, scale, weight, bias, eps)
    given = (None if t is None else t.contiguous() for t in (x, branch, scale, weight, bias))
    return _ResidualNorm.apply(*given, float(eps), compute_dtype(x))


def _plain(x, branch, scale, weight, bias, eps) -> tuple[Tensor, Tensor]:
    y = x if branch is None else x + (branch if scale is None else branch * scale)
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, eps).to(compute_dtype(x))
