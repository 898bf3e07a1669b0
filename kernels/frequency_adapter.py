"""Earth-Adapter's mixture of three frequency experts, projected first and filtered after.

The low-pass acts on the grid and a projection on channels, so they commute: x goes down to 3d + 3 channels first
(``enter``: three experts and the router), the filter runs on 2d of these, and one product (``leave``) comes back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _frequency_kernels
from ._support import accumulation_dtype, compute_dtype, pick_backend
from .low_pass import (
    MAX_SIDE,
    GridFilter,
    apply_filter,
    grid_limits,
    learnable_weights,
    low_pass_fft,
    make_filter,
    weight_gradients,
)

MAX_WIDTH = 64


def frequency_adapter_fft(
    x: Tensor,
    grid: tuple[int, int],
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    router: Tensor,
    router_bias: Tensor,
    scale: Tensor,
    cutoff: float = 0.3,
    band: str = "official",
) -> Tensor:
    """The module as its paper defines it, with the FFT at full width. For tests and benchmarks."""
    low = low_pass_fft(x, grid, cutoff, band)
    weights = torch.softmax(torch.nn.functional.linear(x, router, router_bias), dim=-1)
    mixture = torch.zeros_like(x)
    for j, part in enumerate((x, low, x - low)):
        hidden = torch.relu(torch.nn.functional.linear(part, down[j], down_bias[j]))
        mixture = mixture + weights[..., j : j + 1] * torch.nn.functional.linear(hidden, up[j], up_bias[j])
    return x + scale * mixture


def _split_bands(hidden: Tensor, grid: tuple[int, int], kept: GridFilter) -> Tensor:
    """In place, for hidden [B, N, 3d+3]: expert 2 keeps its low-pass, expert 3 what that leaves. Self-adjoint."""
    d = hidden.shape[-1] // 3 - 1
    low = apply_filter(hidden[..., d : 3 * d], grid, kept)
    hidden[..., d : 2 * d] = low[..., :d]
    hidden[..., 2 * d : 3 * d] -= low[..., d:]
    return hidden


def _mix(hidden: Tensor) -> Tensor:
    """[w1 a1 | w2 a2 | w3 a3 | w] of hidden [B, N, 3d+3]: gated activations and gates."""
    experts, logits = _parts(hidden)
    gates = torch.softmax(logits, dim=-1)
    return torch.cat([(experts.relu() * gates[..., None]).flatten(-2), gates], dim=-1)


def _mix_backward(hidden: Tensor, dmixed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden [B, N, 3d+3] from d (scale * mixed); also scale * mixed, and <d mixed, mixed> of each token."""
    experts, logits = _parts(hidden)
    gates = torch.softmax(logits, dim=-1)
    active = experts.relu()
    dexperts, dgates = _parts(dmixed)
    dgates = dgates + (dexperts * active).sum(-1)
    inner = (gates * dgates).sum(-1, keepdim=True)
    dlogits = gates * (dgates - inner) * scale
    scaled = gates[..., None] * scale
    dexperts = torch.where(experts > 0, dexperts * scaled, 0)
    mixed = torch.cat([(active * scaled).flatten(-2), scaled.squeeze(-1)], dim=-1)
    return torch.cat([dexperts.flatten(-2), dlogits], dim=-1), mixed, inner


def _parts(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [B, N, 3, d] and router [B, N, 3]."""
    d = hidden.shape[-1] // 3 - 1
    return hidden[..., : 3 * d].unflatten(-1, (3, d)), hidden[..., 3 * d :]


def _add_product(x: Tensor, narrow: Tensor, weight: Tensor) -> Tensor:
    """x [B, N, C] + narrow [B, N, R] @ weight [R, C], in the dtype of x."""
    if x.dtype != weight.dtype:
        return x + narrow @ weight
    return torch.baddbmm(x, narrow, weight.expand(x.shape[0], -1, -1))


def _weight_gradient(narrow: Tensor, wide: Tensor) -> Tensor:
    """[R, C] = sum over all tokens of narrow [B, N, R] times wide [B, N, C]."""
    return (narrow.mT @ wide.to(narrow.dtype)).sum(0)


def _forward(x, enter, bias, leave, scale, kept, grid):
    hidden = x.to(enter.dtype) @ enter.mT
    hidden = _split_bands(hidden, grid, kept).add_(bias)
    return _add_product(x, _mix(hidden).mul_(scale), leave), hidden


def _backward(x, hidden, enter, leave, scale, kept, grid, dy, wants_x, wants_enter, wants_leave, wants_cutoff):
    """As :func:`._frequency_kernels.backward`."""
    dy_narrow = dy.to(leave.dtype)
    dhidden, mixed, inner = _mix_backward(hidden, dy_narrow @ leave.mT, scale)
    dleave = _weight_gradient(mixed, dy_narrow) if wants_leave else None
    dbias = dhidden.sum((0, 1))
    dscale = inner.sum(dtype=accumulation_dtype(inner.dtype)).to(scale.dtype)
    unfiltered = dhidden.clone() if wants_cutoff else None
    dx = denter = None
    if wants_x or wants_enter:
        dhidden = _split_bands(dhidden, grid, kept)
        dx = _add_product(dy, dhidden, enter) if wants_x else None
        denter = _weight_gradient(dhidden, x) if wants_enter else None
    return dx, denter, dbias, dleave, dscale, unfiltered


class _FrequencyAdapter(torch.autograd.Function):
    """Keeps x and hidden [B, N, 3d+3] only. hidden is what enters the activations: filtered, with bias."""

    @staticmethod
    def forward(x, enter, bias, leave, scale, row_weights, column_weights, kept, grid, backend):
        run = _frequency_kernels.forward if backend == "triton" else _forward
        return run(x, enter, bias, leave, scale, kept, grid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, enter, _, leave, scale, _, _, ctx.kept, ctx.grid, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], enter, leave, scale)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 10
        x, hidden, enter, leave, scale = ctx.saved_tensors
        wants_x, wants_enter, _, wants_leave, _, wants_cutoff, *_ = ctx.needs_input_grad
        run = _frequency_kernels.backward if ctx.backend == "triton" else _backward
        *gradients, unfiltered = run(
            x, hidden, enter, leave, scale, ctx.kept, ctx.grid, dy, wants_x, wants_enter, wants_leave, wants_cutoff
        )
        cutoff = (None, None) if unfiltered is None else _cutoff_gradients(x, unfiltered, enter, ctx.grid, ctx.kept)
        return *gradients, *cutoff, None, None, None


def _cutoff_gradients(x: Tensor, dhidden: Tensor, enter: Tensor, grid: tuple[int, int], kept: GridFilter):
    """Gradients of the filter's weights; projects x again, since hidden holds only what the filter left."""
    d = dhidden.shape[-1] // 3 - 1
    unfiltered = x.to(enter.dtype) @ enter[d : 3 * d].mT
    signed = torch.cat([dhidden[..., d : 2 * d], -dhidden[..., 2 * d : 3 * d]], dim=-1)
    return weight_gradients(unfiltered, signed, grid, kept)


def frequency_adapter(
    x: Tensor,
    grid: tuple[int, int],
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    router: Tensor,
    router_bias: Tensor,
    scale: Tensor | float,
    cutoff: float | Tensor = 0.3,
    band: str = "official",
    *,
    tau: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """x plus the gated sum of three bottleneck experts that see x, its low-pass and its high-pass.

    Args:
        x: [B, H*W, C] patch tokens row by row; float32, bfloat16, float16 (float64 in PyTorch only); any strides.
        grid: (H, W).
        down, down_bias: [3, d, C], [3, d]; experts in the order spatial, low, high.
        up, up_bias: [3, C, d], [3, C].
        router, router_bias: [3, C], [3]; logits of the gates.
        scale: [] factor of the mixture.
        cutoff, band, tau: as in :func:`low_pass`.
        backend: "auto", "torch" or "triton".

    Returns:
        [B, H*W, C] in the dtype of x: ``x + scale * mixture``. Weights are cast to the dtype of x, or to autocast's.

    Raises:
        ValueError: shapes, cutoff or band do not fit.

    Source: Earth-Adapter, arXiv:2504.06220; spec: project first, filter after.
    """
    _check(x, down, down_bias, up, up_bias, router, router_bias)
    dtype = compute_dtype(x)
    chosen = pick_backend("frequency_adapter", backend, limits=_limits(grid, down), x=x, down=down)
    enter = torch.cat([down.flatten(0, 1), router]).to(dtype)  # [3d+3, C]
    enter_bias = torch.cat([down_bias.flatten(), router_bias]).to(dtype)
    leave = torch.cat([up.mT.flatten(0, 1), up_bias]).to(dtype)  # [3d+3, C]
    scale = torch.as_tensor(scale, dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        kept = make_filter(x, grid, cutoff, band, tau)
        return _FrequencyAdapter.apply(
            x, enter, enter_bias, leave, scale, *learnable_weights(kept, cutoff), kept, tuple(grid),
            chosen if x.numel() else "torch",
        )[0]  # fmt: skip


def _limits(grid: tuple[int, int], down: Tensor) -> list[str]:
    """Reasons why the sizes do not fit the Triton kernels."""
    most = MAX_WIDTH if grid[1] <= MAX_SIDE // 4 else MAX_WIDTH // 2  # a tile holds whole rows in registers
    d = down.shape[1]
    return grid_limits(grid) + ([f"experts are {d} wide, at most {most} on {grid[1]} columns"] if d > most else [])


def _check(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, router: Tensor, router_bias: Tensor
) -> None:
    channels, d = x.shape[-1], down.shape[1] if down.ndim == 3 else 0
    expected = {
        "down": (3, d, channels),
        "down_bias": (3, d),
        "up": (3, channels, d),
        "up_bias": (3, channels),
        "router": (3, channels),
        "router_bias": (3,),
    }
    given = (down, down_bias, up, up_bias, router, router_bias)
    wrong = [
        f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
        for (name, shape), tensor in zip(expected.items(), given, strict=True)
        if tuple(tensor.shape) != shape
    ]
    if wrong:
        raise ValueError(f"frequency_adapter: {'; '.join(wrong)}")


class Factors(NamedTuple):
    """Backward of the module, with what its weight gradients are made of; weights are stacked in the order of the file.

    ``d [down; router] = dhidden^T x`` [3d+3, C] and ``d [up | up_bias] = dy^T mixed`` [C, 3d+3]; ``dbias`` [B, 3d+3],
    ``dscale`` [B] and ``dcutoff`` [B] (``None`` for a fixed cutoff) hold each sample's own gradient.
    """

    dx: Tensor
    dhidden: Tensor
    mixed: Tensor
    dbias: Tensor
    dscale: Tensor
    dcutoff: Tensor | None


def frequency_adapter_factors(
    x: Tensor,
    dy: Tensor,
    grid: tuple[int, int],
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    router: Tensor,
    router_bias: Tensor,
    scale: Tensor,
    cutoff: float | Tensor = 0.3,
    band: str = "official",
    *,
    tau: float = 0.5,
) -> Factors:
    """Per-sample backward of :func:`frequency_adapter` for x [B, H*W, C] and the gradient dy of its result.

    Weights have the dtype of the products; ``dx`` is that of the mixture, without the residual's ``dy``.
    """
    grid = tuple(grid)
    with torch.enable_grad():  # the smooth edge is differentiated by its cutoff below
        leaf = cutoff.detach().requires_grad_() if isinstance(cutoff, Tensor) else cutoff
        kept = make_filter(x, grid, leaf, band, tau)
    filtering = GridFilter(*(part.detach() if isinstance(part, Tensor) else part for part in kept))
    enter = torch.cat([down.flatten(0, 1), router])
    bias = torch.cat([down_bias.flatten(), router_bias])
    leave = torch.cat([up.mT.flatten(0, 1), up_bias])
    projected = x.to(enter.dtype) @ enter.mT
    hidden = _split_bands(projected.clone(), grid, filtering).add_(bias)
    dhidden, mixed, inner = _mix_backward(hidden, dy.to(leave.dtype) @ leave.mT, scale)
    wide = accumulation_dtype(dhidden.dtype)
    dcutoff = None
    if isinstance(cutoff, Tensor):
        d = down.shape[1]
        signed = torch.cat([dhidden[..., d : 2 * d], -dhidden[..., 2 * d : 3 * d]], dim=-1)
        slopes = [weight_gradients(*pair, grid, filtering) for pair in _samples(projected[..., d : 3 * d], signed)]
        edges = (kept.row_weights, kept.column_weights)
        dcutoff = torch.stack([torch.autograd.grad(edges, leaf, slope, retain_graph=True)[0] for slope in slopes])
    dbias, dscale = dhidden.sum(1, dtype=wide), inner.sum((1, 2), dtype=wide)
    dhidden = _split_bands(dhidden, grid, filtering)
    return Factors(dhidden @ enter, dhidden, mixed, dbias, dscale, dcutoff)


def _samples(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(1) for tensor in tensors), strict=True))
