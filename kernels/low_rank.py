"""Low-rank maps beside a frozen one: bottleneck adapters and LoRA, added to what they accompany."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _low_rank_kernels
from ._support import (
    accumulation_dtype,
    compute_dtype,
    define,
    differentiable,
    is_traced,
    pick_backend,
    refuse_second_derivatives,
    transforms,
    without_autocast,
)

ACTIVATIONS = (None, "relu", "gelu")
MAX_RANK = 256


def _activate(pre: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.relu(pre)
    return torch.nn.functional.gelu(pre) if activation == "gelu" else pre


def _activate_backward(pre: Tensor, dhidden: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.where(pre > 0, dhidden, 0)
    return torch.ops.aten.gelu_backward(dhidden, pre) if activation == "gelu" else dhidden


def _product(narrow: Tensor, weight: Tensor, scale: float, base: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """base + scale * narrow [M, r] @ weight [out, r]^T."""
    if base is None:
        return (scale * narrow @ weight.mT).to(out_dtype)
    if base.dtype == narrow.dtype:
        return torch.addmm(base, narrow, weight.mT, alpha=scale)
    return (narrow @ weight.mT).to(out_dtype).mul_(scale).add_(base)


def _rows(x: Tensor) -> Tensor:
    """[M, C] with unit stride in a row, of x [..., C]."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _cast(dtype: torch.dtype, *weights: Tensor | None) -> list[Tensor | None]:
    """Contiguous and in the dtype of the products, as the kernels read them."""
    return [None if weight is None else weight.to(dtype).contiguous() for weight in weights]


def _forward(x, down, up, base, down_bias, up_bias, activation, scale):
    """As :func:`._low_rank_kernels.forward`."""
    narrow = x.to(down.dtype)
    pre = narrow @ down.mT if down_bias is None else torch.addmm(down_bias, narrow, down.mT)
    y = _product(_activate(pre, activation), up, scale, base, x.dtype if base is None else base.dtype)
    return y if up_bias is None else y.add_(up_bias, alpha=scale), pre


def _backward(x, pre, down, up, dy, activation, scale, dtypes, wants_x, wants_down, wants_up):
    """As :func:`._low_rank_kernels.backward`."""
    dy = dy.to(up.dtype)
    dup = (dy.mT @ (_activate(pre, activation) * scale)).to(dtypes[1]) if wants_up else None
    dpre = _activate_backward(pre, (dy @ up).mul_(scale), activation)
    dx = (dpre @ down).to(x.dtype) if wants_x else None
    return dx, (dpre.mT @ x.to(dpre.dtype)).to(dtypes[0]) if wants_down else None, dup, dpre


def _run(x, down, up, base, down_bias, up_bias, activation, scale, dtype, backend):
    """y [..., out] and the narrow pre-activation [M, r]."""
    with torch.no_grad(), without_autocast(x):
        run = _low_rank_kernels.forward if backend == "triton" else _forward
        weights = _cast(dtype, down, up), _cast(dtype, down_bias, up_bias)
        y, pre = run(_rows(x), *weights[0], None if base is None else _rows(base), *weights[1], activation, scale)
    return y.view(*x.shape[:-1], y.shape[-1]), pre


def _fake(x, down, up, base, down_bias, up_bias, activation, scale, dtype, backend):
    shape = (*x.shape[:-1], up.shape[0])
    return (x if base is None else base).new_empty(shape), x.new_empty(x[..., 0].numel(), down.shape[0], dtype=dtype)


def _empty_or(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only, and each its own."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _run_backward(dy, x, pre, down, up, activation, scale, backend, wants_x, wants_down, wants_up, *wants_biases):
    """dx, ddown, dup, ddown_bias, dup_bias; empty where nobody wants one."""
    with torch.no_grad(), without_autocast(x):
        run = _low_rank_kernels.backward if backend == "triton" else _backward
        flat, weights = _rows(dy), _cast(pre.dtype, down, up)
        dtypes = down.dtype, up.dtype
        dx, ddown, dup, dpre = run(
            _rows(x), pre, *weights, flat, activation, scale, dtypes, wants_x, wants_down, wants_up
        )  # fmt: skip
        ddown_bias = dpre.sum(0, dtype=down.dtype) if wants_biases[0] else None
        dup_bias = None
        if wants_biases[1]:
            dup_bias = flat.sum(0, dtype=accumulation_dtype(flat.dtype)).mul_(scale).to(up.dtype)
    return _empty_or(x, None if dx is None else dx.view(x.shape), ddown, dup, ddown_bias, dup_bias)


def _fake_backward(dy, x, pre, down, up, activation, scale, backend, *wants):
    shapes = (x, x.shape), (down, down.shape), (up, up.shape), (down, down.shape[:1]), (up, up.shape[:1])
    return _empty_or(x, *(t.new_empty(shape) if w else None for (t, shape), w in zip(shapes, wants, strict=True)))


def _setup(ctx, inputs, output) -> None:
    """Keeps x and the narrow pre-activation."""
    x, down, up, _, _, _, ctx.activation, ctx.scale, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], down, up)


def _differentiate(ctx, dy: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    refuse_second_derivatives("low_rank")
    wants_x, wants_down, wants_up, wants_base, *wants_biases = ctx.needs_input_grad[:6]
    wants = (wants_x, wants_down, wants_up, *wants_biases)
    found = _low_rank_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.scale, ctx.backend, *wants)
    dx, ddown, dup, *biases = (gradient if want else None for gradient, want in zip(found, wants, strict=True))
    return dx, ddown, dup, dy if wants_base else None, *biases, None, None, None, None


define(
    "fused_low_rank(Tensor x, Tensor down, Tensor up, Tensor? base, Tensor? down_bias, Tensor? up_bias, "
    "str? activation, float scale, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
_low_rank_backward = define(
    "fused_low_rank_backward(Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, str? activation, float scale, "
    "str backend, bool wants_x, bool wants_down, bool wants_up, bool wants_down_bias, bool wants_up_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_low_rank = differentiable("fused_low_rank", _run, _setup, _differentiate)


def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    base: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """``base + scale * (up(activation(down(x))))``: LoRA without activation, a bottleneck adapter with one.

    Args:
        x: [..., C] float32, bfloat16, float16 (float64 in PyTorch only); any strides.
        down, down_bias: [r, C], [r].
        up, up_bias: [out, r], [out]; the bias is scaled too.
        base: [..., out] what the result is added to, unchanged; any strides, for example a part of a qkv output.
        activation: None, "relu" or "gelu" (exact).
        scale: factor of the low-rank part.
        backend: "auto", "torch" or "triton".

    Returns:
        [..., out] in the dtype of base, or of x without one. Weights are cast to the dtype of x, or to autocast's.

    Raises:
        ValueError: shapes or activation do not fit.

    Source: LoRA, arXiv:2106.09685; AdaptFormer, arXiv:2205.13535.
    """
    _check(x, down, up, base, down_bias, up_bias, activation)
    chosen = _pick("low_rank", backend, down.shape[0], out=up.shape[0], x=x, down=down)
    weights = (down, up, base, down_bias, up_bias)
    if transforms():
        return _plain(x, *weights, activation, scale)
    return _low_rank(x, *weights, activation, float(scale), compute_dtype(x), chosen)[0]


def _plain(x, down, up, base, down_bias, up_bias, activation, scale) -> Tensor:
    """The formula as PyTorch differentiates it, as often and in whichever mode it is asked to."""
    dtype = compute_dtype(x)
    down, up, down_bias, up_bias = (None if w is None else w.to(dtype) for w in (down, up, down_bias, up_bias))
    with without_autocast(x):
        hidden = _activate(torch.nn.functional.linear(x.to(dtype), down, down_bias), activation)
        y = scale * torch.nn.functional.linear(hidden, up, up_bias)
        return y.to(x.dtype) if base is None else (base + y).to(base.dtype)


def _pick(op: str, backend: str, rank: int, *, out: int, **tensors: Tensor) -> str:
    limits = [f"rank {rank} is above {MAX_RANK}"] if rank > MAX_RANK else []
    chosen = pick_backend(op, backend, limits=limits, **tensors)
    return chosen if tensors["x"].numel() and rank and out else "torch"


def low_rank_factors(
    x: Tensor,
    dy: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    activation: str | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`low_rank` without a base, with what its weight gradients are made of.

    Args:
        x: [B, T, C].
        dy: [B, T, out], gradient of the result.

    Returns:
        dx [B, T, C]; dpre [B, T, r], so that ``d down = dpre^T x`` and ``d down_bias = sum dpre``; hidden [B, T, r], so
        that ``d up = dy^T hidden`` and ``d up_bias = scale * sum dy``. All in the dtype of ``down``.
    """
    return _factors(x, dy, down, up, down_bias, activation, float(scale))


def _run_factors(x, dy, down, up, down_bias, activation, scale):
    with torch.no_grad(), without_autocast(x):
        x, dy = x.to(down.dtype), dy.to(down.dtype)
        pre = torch.nn.functional.linear(x, down, down_bias)
        dpre = _activate_backward(pre, (dy @ up).mul_(scale), activation)
        return dpre @ down, dpre, _activate(pre, activation) * scale


def _fake_factors(x, dy, down, *rest):
    narrow = (*x.shape[:-1], down.shape[0])
    return down.new_empty(x.shape), down.new_empty(narrow), down.new_empty(narrow)


_factors = define(
    "fused_low_rank_factors(Tensor x, Tensor dy, Tensor down, Tensor up, Tensor? down_bias, str? activation, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _run_factors,
    _fake_factors,
)


def _add_qv(qkv, x, down_q, up_q, down_v, up_v, scale, dtype, backend):
    """Adds to q and v of qkv [B, T, 3D] in place; hidden [M, 2r], and the maps of q and v one behind the other."""
    with torch.no_grad(), without_autocast(x):
        down, up = torch.cat([down_q, down_v]).to(dtype), torch.stack([up_q, up_v]).to(dtype)
        _, width, rank = up.shape
        x, flat = _rows(x), qkv.view(-1, 3 * width)
        if backend == "triton":
            return _low_rank_kernels.forward_qv(x, down, up, flat, scale), down, up
        hidden = x.to(dtype) @ down.mT
        for part in (0, 1):
            target, narrow = flat[:, 2 * part * width :][:, :width], hidden[:, part * rank :][:, :rank]
            if qkv.dtype == dtype:
                target.addmm_(narrow, up[part].mT, alpha=scale)
            else:
                target += scale * (narrow @ up[part].mT)
    return hidden, down, up


def _run_qv(qkv, *rest):
    """As :func:`_add_qv` to a copy, which is returned first."""
    y = qkv.clone()
    return y, *_add_qv(y, *rest)


def _fake_qv(qkv, x, down_q, up_q, down_v, up_v, scale, dtype, backend):
    rank, width = down_q.shape[0], up_q.shape[0]
    hidden = x.new_empty(x[..., 0].numel(), 2 * rank, dtype=dtype)
    stacks = x.new_empty(2 * rank, x.shape[-1], dtype=dtype), x.new_empty(2, width, rank, dtype=dtype)
    return qkv.new_empty(qkv.shape), hidden, *stacks


def _run_qv_backward(dqkv, x, hidden, down, up, scale, dtype, backend, *wants):
    """dx, d [down_q; down_v] [2r, C], d [up_q, up_v] [2, D, r]; empty where nobody wants one."""
    with torch.no_grad(), without_autocast(x):
        run = _low_rank_kernels.backward_qv if backend == "triton" else _backward_qv
        dx, ddown, dup = run(_rows(x), hidden, down, up, _rows(dqkv), scale, dtype, *wants)
    return _empty_or(x, None if dx is None else dx.view(x.shape), ddown, dup)


def _backward_qv(x, hidden, down, up, dqkv, scale, dtype, wants_x, wants_down, wants_up):
    """As :func:`._low_rank_kernels.backward_qv`."""
    _, width, rank = up.shape
    dq, _, dv = dqkv.to(down.dtype).split(width, dim=1)
    dx = ddown = dup = None
    if wants_up:
        dup = torch.stack([dq.mT @ (hidden[:, :rank] * scale), dv.mT @ (hidden[:, rank:] * scale)]).to(dtype)
    if wants_x or wants_down:
        dhidden = torch.cat([dq @ up[0], dv @ up[1]], dim=1).mul_(scale)
        dx = (dhidden @ down).to(x.dtype) if wants_x else None
        ddown = (dhidden.mT @ x.to(down.dtype)).to(dtype) if wants_down else None
    return dx, ddown, dup


def _fake_qv_backward(dqkv, x, hidden, down, up, scale, dtype, backend, *wants):
    made = x.new_empty(x.shape), down.new_empty(down.shape, dtype=dtype), up.new_empty(up.shape, dtype=dtype)
    return _empty_or(x, *(gradient if want else None for gradient, want in zip(made, wants, strict=True)))


def _setup_qv(ctx, inputs, output) -> None:
    _, x, down_q, _, _, _, ctx.scale, _, ctx.backend = inputs
    ctx.dtype = down_q.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:])


def _differentiate_qv(ctx, dqkv: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    """The gradient of qkv passes straight through."""
    if dqkv is None:
        return (None,) * 9
    refuse_second_derivatives("low_rank_qv_")
    _, wants_x, *wants = ctx.needs_input_grad[:6]
    both = wants_x, wants[0] or wants[2], wants[1] or wants[3]
    dx, ddown, dup = _low_rank_qv_backward(dqkv, *ctx.saved_tensors, ctx.scale, ctx.dtype, ctx.backend, *both)
    (ddown_q, ddown_v), (dup_q, dup_v) = ddown.chunk(2) if both[1] else (None, None), dup if both[2] else (None, None)
    found = (ddown_q, dup_q, ddown_v, dup_v)
    gradients = (gradient if want else None for gradient, want in zip(found, wants, strict=True))
    return dqkv, dx if wants_x else None, *gradients, None, None, None


class _LowRankQV(torch.autograd.Function):
    """The operator in place. It returns qkv alone, since a function that changes a view may return one tensor only."""

    @staticmethod
    def forward(ctx, qkv, *rest):
        ctx.mark_dirty(qkv)
        _setup_qv(ctx, (qkv, *rest), (qkv, *_add_qv(qkv, *rest)))
        return qkv

    backward = staticmethod(_differentiate_qv)


define(
    "fused_low_rank_qv(Tensor qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, float scale, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_qv,
    _fake_qv,
)
_low_rank_qv_backward = define(
    "fused_low_rank_qv_backward(Tensor dqkv, Tensor x, Tensor hidden, Tensor down, Tensor up, float scale, "
    "ScalarType dtype, str backend, bool wants_x, bool wants_down, bool wants_up) -> (Tensor, Tensor, Tensor)",
    _run_qv_backward,
    _fake_qv_backward,
)
_low_rank_qv = differentiable("fused_low_rank_qv", _run_qv, _setup_qv, _differentiate_qv)


def low_rank_qv_(
    qkv: Tensor,
    x: Tensor,
    down_q: Tensor,
    up_q: Tensor,
    down_v: Tensor,
    up_v: Tensor,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """LoRA on the query and value parts of a fused qkv output, added in place.

    Args:
        qkv: [B, T, 3D] contiguous output of the fused projection; changed and returned. No leaf that wants a gradient.
        x: [B, T, C], what the projection saw.
        down_q, down_v: [r, C].
        up_q, up_v: [D, r].
        scale: factor of the low-rank part.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: shapes do not fit, or qkv is not contiguous.
    """
    rank, width = down_q.shape[0], up_q.shape[0]
    if not qkv.is_contiguous() or qkv.shape != (*x.shape[:-1], 3 * width):
        raise ValueError(
            f"low_rank_qv_: qkv {tuple(qkv.shape)} must be contiguous and {(*x.shape[:-1], 3 * width)} "
            f"for x {tuple(x.shape)} and up_q {tuple(up_q.shape)}"
        )
    for name, down, up in (("q", down_q, up_q), ("v", down_v, up_v)):
        if down.shape != (rank, x.shape[-1]) or up.shape != (width, rank):
            raise ValueError(
                f"low_rank_qv_: down_{name} {tuple(down.shape)} and up_{name} {tuple(up.shape)} must be "
                f"{(rank, x.shape[-1])} and {(width, rank)}"
            )
    chosen = _pick("low_rank_qv_", backend, rank, out=width, qkv=qkv, x=x, down_q=down_q)
    maps, dtype = (down_q, up_q, down_v, up_v), compute_dtype(x)
    if transforms():
        q, _, v = qkv.chunk(3, dim=-1)
        delta = [_plain(x, *pair, None, None, None, None, scale).to(qkv.dtype) for pair in (maps[:2], maps[2:])]
        return qkv.copy_(torch.cat([q + delta[0], qkv[..., width : 2 * width], v + delta[1]], dim=-1))
    if is_traced(qkv):  # the copy goes where nobody else looks at qkv
        return qkv.copy_(_low_rank_qv(qkv, x, *maps, float(scale), dtype, chosen)[0])
    return _LowRankQV.apply(qkv, x, *maps, float(scale), dtype, chosen)


def _check(x, down, up, base, down_bias, up_bias, activation) -> None:
    rank, out = down.shape[0], up.shape[0]
    expected = {
        "down": (down, (rank, x.shape[-1])),
        "up": (up, (out, rank)),
        "base": (base, (*x.shape[:-1], out)),
        "down_bias": (down_bias, (rank,)),
        "up_bias": (up_bias, (out,)),
    }
    problems = [
        f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if activation not in ACTIVATIONS:
        problems.append(f"activation={activation!r} is unknown, use None, 'relu' or 'gelu'")
    if problems:
        raise ValueError(f"low_rank: {'; '.join(problems)}")
