"""Earth-Adapter's mixture of three frequency experts, projected first and filtered after.

The low-pass acts on the grid and a projection on channels, so they commute: x goes down to 3d + 3 channels first
(``enter``: three experts and the router), the filter runs on 2d of these, and one product (``leave``) comes back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _frequency_kernels
from ._support import (
    accumulation_dtype,
    compute_dtype,
    define,
    differentiable,
    pick_backend,
    refuse_second_derivatives,
    transforms,
    without_autocast,
)
from .low_pass import (
    EDGE,
    MAX_SIDE,
    Edge,
    GridFilter,
    apply_filter,
    as_edge,
    check_grid,
    cutoff_gradients,
    grid_limits,
    low_pass_fft,
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


def _add_product(x: Tensor, narrow: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x [B, N, C] + narrow [B, N, R] @ weight [R, C], in the dtype of x."""
    if x.dtype != weight.dtype:
        torch.add(x, narrow @ weight, out=out)
    else:
        torch.baddbmm(x, narrow, weight.expand(x.shape[0], -1, -1), out=out)


def _weight_gradient(narrow: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, C] = sum over all tokens of narrow [B, N, R] times wide [B, N, C]."""
    return (narrow.mT @ wide.to(narrow.dtype)).sum(0, dtype=dtype)


def _hidden(x: Tensor, enter: Tensor, bias: Tensor, kept: GridFilter, grid: tuple[int, int]) -> Tensor:
    """[B, N, 3d+3], what enters the activations: filtered, with bias."""
    return _split_bands(x.to(enter.dtype) @ enter.mT, grid, kept).add_(bias)


def _forward(x, enter, bias, leave, scale, kept, grid, y):
    hidden = _hidden(x, enter, bias, kept, grid)
    _add_product(x, _mix(hidden).mul_(scale), leave, y)
    return hidden


def _backward(x, hidden, enter, leave, scale, kept, grid, dy, dx, dtype, wants_enter, wants_leave, wants_cutoff):
    """As :func:`._frequency_kernels.backward`."""
    dy_narrow = dy.to(leave.dtype)
    dhidden, mixed, inner = _mix_backward(hidden, dy_narrow @ leave.mT, scale)
    dleave = _weight_gradient(mixed, dy_narrow, dtype) if wants_leave else None
    dbias = dhidden.sum((0, 1), dtype=dtype)
    dscale = inner.sum(dtype=accumulation_dtype(inner.dtype)).to(scale.dtype)
    unfiltered = dhidden.clone() if wants_cutoff else None
    denter = None
    if dx is not None or wants_enter:
        dhidden = _split_bands(dhidden, grid, kept)
        if dx is not None:
            _add_product(dy, dhidden, enter, dx)
        denter = _weight_gradient(dhidden, x, dtype) if wants_enter else None
    return denter, dbias, dleave, dscale, unfiltered


def _stack(dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """enter [3d+3, C], its bias [3d+3] and leave [3d+3, C]: experts and router one behind the other."""
    down, down_bias, up, up_bias, router, router_bias = weights
    pairs = (down.flatten(0, 1), router), (down_bias.flatten(), router_bias), (up.mT.flatten(0, 1), up_bias)
    return tuple(torch.cat(pair).to(dtype) for pair in pairs)


def _passing(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """A contiguous tensor like x with its first tokens, and the part of it that is to be filled."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    return y, y[:, prefix:]


def _run(x, down, down_bias, up, up_bias, router, router_bias, scale, *rest):
    *edge, prefix, dtype, backend = rest
    edge = Edge(*edge)
    with torch.no_grad(), without_autocast(x):
        enter, bias, leave = _stack(dtype, down, down_bias, up, up_bias, router, router_bias)
        run = _frequency_kernels.forward if backend == "triton" else _forward
        y, patches = _passing(x, prefix)
        x = x[:, prefix:]
        hidden = run(x, enter, bias, leave, scale, edge.filter(x), edge.grid, patches)
    return y, hidden, enter, leave


def _fake(x, down, down_bias, up, up_bias, router, router_bias, scale, height, width, *rest):
    *_, prefix, dtype, backend = rest
    rank, patches = 3 * down.shape[1] + 3, x[:, prefix:]
    if backend == "triton":
        hidden = _frequency_kernels.hidden_like(patches, rank, dtype)
    else:
        hidden = x.new_empty(*patches.shape[:2], rank, dtype=dtype)
    stacks = (x.new_empty(rank, x.shape[2], dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), hidden, *stacks


def _run_backward(dy, x, hidden, enter, leave, scale, *rest):
    """dx, denter, dbias, dleave, dscale and dcutoff; empty where nobody wants one."""
    *edge, prefix, dtype, backend, wants_x, wants_enter, wants_leave, wants_cutoff = rest
    edge = Edge(*edge)
    with torch.no_grad(), without_autocast(x):
        run = _frequency_kernels.backward if backend == "triton" else _backward
        dx, patches = _passing(dy, prefix) if wants_x else (None, None)
        x, dy = x[:, prefix:], dy[:, prefix:]
        kept = edge.filter(x)
        *gradients, unfiltered = run(
            x, hidden, enter, leave, scale, kept, edge.grid, dy, patches, dtype, wants_enter, wants_leave, wants_cutoff
        )
        dcutoff = None
        if wants_cutoff:
            slopes = _cutoff_gradients(x.to(enter.dtype) @ enter.mT, unfiltered, edge, kept)
            dcutoff = slopes.sum(0).to(edge.learned.dtype).view(edge.learned.shape)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, *gradients, dcutoff))


def _fake_backward(dy, x, hidden, enter, leave, scale, height, width, cutoff, learned, *rest):
    *_, dtype, _, wants_x, wants_enter, wants_leave, wants_cutoff = rest
    rank, channels = enter.shape
    return (
        dy.new_empty(dy.shape if wants_x else 0),
        enter.new_empty((rank, channels), dtype=dtype) if wants_enter else x.new_empty(0),
        enter.new_empty(rank, dtype=dtype),
        enter.new_empty((rank, channels), dtype=dtype) if wants_leave else x.new_empty(0),
        torch.empty_like(scale),
        torch.empty_like(learned) if wants_cutoff else x.new_empty(0),
    )


def _cutoff_gradients(projected: Tensor, dhidden: Tensor, edge: Edge, kept: GridFilter) -> Tensor:
    """[B]: projected [B, N, 3d+3] is what the filter got, dhidden the gradient of what it left."""
    d = dhidden.shape[-1] // 3 - 1
    signed = torch.cat([dhidden[..., d : 2 * d], -dhidden[..., 2 * d : 3 * d]], dim=-1)
    return cutoff_gradients(projected[..., d : 3 * d], signed, edge, kept)


def _setup(ctx, inputs, output) -> None:
    """Keeps x and hidden [B, N, 3d+3], besides what is of the size of the weights."""
    x, down, *_, scale, height, width, cutoff, learned, band, tau, ctx.prefix, _, ctx.backend = inputs
    _, hidden, enter, leave = output
    ctx.edge, ctx.dtype = (height, width, cutoff, None, band, tau), down.dtype
    ctx.mark_non_differentiable(hidden, enter, leave)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, hidden, enter, leave, scale, learned)


def _differentiate(ctx, dy: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 17
    refuse_second_derivatives("frequency_adapter")
    *saved, learned = ctx.saved_tensors
    x, enter = saved[0], saved[2]
    wants_x, wants_down, _, wants_up, wants_up_bias, wants_router = ctx.needs_input_grad[:6]
    wants = (wants_x, wants_down or wants_router, wants_up or wants_up_bias, ctx.needs_input_grad[11])
    edge = (*ctx.edge[:3], learned, *ctx.edge[4:])
    dx, denter, dbias, dleave, dscale, dcutoff = _frequency_adapter_backward(
        dy, *saved, *edge, ctx.prefix, ctx.dtype, ctx.backend, *wants
    )
    channels, d = x.shape[2], enter.shape[0] // 3 - 1
    gradients = [dx, None, dbias[: 3 * d].view(3, d), None, None, None, dbias[3 * d :], dscale]
    if wants[1]:
        gradients[1], gradients[5] = denter[: 3 * d].view(3, d, channels), denter[3 * d :]
    if wants[2]:
        gradients[3], gradients[4] = dleave[: 3 * d].view(3, d, channels).mT, dleave[3 * d :]
    gradients = [g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad[:8], strict=True)]
    return *gradients, None, None, None, dcutoff if wants[3] else None, None, None, None, None, None


define(
    "fused_frequency_adapter(Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, "
    f"Tensor router_bias, Tensor scale, {EDGE}, SymInt prefix, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_frequency_adapter_backward = define(
    "fused_frequency_adapter_backward(Tensor dy, Tensor x, Tensor hidden, Tensor enter, Tensor leave, Tensor scale, "
    f"{EDGE}, SymInt prefix, ScalarType dtype, str backend, bool wants_x, bool wants_enter, bool wants_leave, "
    "bool wants_cutoff) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_frequency_adapter = differentiable("fused_frequency_adapter", _run, _setup, _differentiate)


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
    prefix: int = 0,
    backend: str = "auto",
) -> Tensor:
    """x plus the gated sum of three bottleneck experts that see x, its low-pass and its high-pass.

    Args:
        x: [B, prefix + H*W, C], patch tokens row by row behind the prefix; float32, bfloat16, float16 (float64 in
            PyTorch only); any strides.
        grid: (H, W).
        down, down_bias: [3, d, C], [3, d]; experts in the order spatial, low, high.
        up, up_bias: [3, C, d], [3, C].
        router, router_bias: [3, C], [3]; logits of the gates.
        scale: [] factor of the mixture.
        cutoff, band, tau: as in :func:`low_pass`.
        prefix: number of tokens before the patches, which pass through.
        backend: "auto", "torch" or "triton".

    Returns:
        [B, prefix + H*W, C] in the dtype of x: ``x + scale * mixture``. Weights are cast to the dtype of x, or to
        autocast's.

    Raises:
        ValueError: shapes, cutoff or band do not fit.

    Source: Earth-Adapter, arXiv:2504.06220; spec: project first, filter after.
    """
    _check(x, grid, cutoff, band, prefix, down, down_bias, up, up_bias, router, router_bias)
    chosen = pick_backend("frequency_adapter", backend, limits=_limits(grid, down), x=x, down=down)
    weights, dtype = (down, down_bias, up, up_bias, router, router_bias), compute_dtype(x)
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=dtype, device=x.device)
    edge = as_edge(grid, cutoff, band, tau)
    if transforms():
        return _plain(x, weights, scale, edge, prefix, dtype)
    return _frequency_adapter(x, *weights, scale, *edge, prefix, dtype, chosen if x.numel() else "torch")[0]


def _plain(x: Tensor, weights: tuple[Tensor, ...], scale: Tensor, edge: Edge, prefix: int, dtype: torch.dtype):
    """The forward pass as PyTorch differentiates it, as often and in whichever mode it is asked to."""
    with without_autocast(x):
        enter, bias, leave = _stack(dtype, *weights)
        patches = x[:, prefix:]
        hidden = _hidden(patches, enter, bias, edge.filter(patches), edge.grid)
        y = (patches + scale * (_mix(hidden) @ leave)).to(x.dtype)
    return torch.cat([x[:, :prefix], y], dim=1) if prefix else y


def _limits(grid: tuple[int, int], down: Tensor) -> list[str]:
    """Reasons why the sizes do not fit the Triton kernels."""
    most = MAX_WIDTH if grid[1] <= MAX_SIDE // 4 else MAX_WIDTH // 2  # a tile holds whole rows in registers
    d = down.shape[1]
    return grid_limits(grid) + ([f"experts are {d} wide, at most {most} on {grid[1]} columns"] if d > most else [])


def _check(x, grid, cutoff, band, prefix, down, down_bias, up, up_bias, router, router_bias) -> None:
    check_grid(x, grid, cutoff, band, prefix)
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


def _run_factors(x, dy, down, down_bias, up, up_bias, router, router_bias, scale, *edge):
    edge = Edge(*edge)
    with torch.no_grad(), without_autocast(x):
        kept = edge.filter(x)
        enter, bias, leave = _stack(down.dtype, down, down_bias, up, up_bias, router, router_bias)
        projected = x.to(enter.dtype) @ enter.mT
        hidden = _split_bands(projected.clone(), edge.grid, kept).add_(bias)
        dhidden, mixed, inner = _mix_backward(hidden, dy.to(leave.dtype) @ leave.mT, scale)
        wide = accumulation_dtype(dhidden.dtype)
        if edge.learned is None:
            dcutoff = x.new_empty(0, dtype=wide)
        else:
            dcutoff = _cutoff_gradients(projected, dhidden, edge, kept).to(edge.learned.dtype)
        dbias, dscale = dhidden.sum(1, dtype=wide), inner.sum((1, 2), dtype=wide)
        dhidden = _split_bands(dhidden, edge.grid, kept)
    return dhidden @ enter, dhidden, mixed, dbias, dscale, dcutoff


def _fake_factors(x, dy, down, down_bias, up, up_bias, router, router_bias, scale, height, width, cutoff, learned, *_):
    rank, wide = 3 * down.shape[1] + 3, accumulation_dtype(down.dtype)
    tokens = x.shape[:2]
    return (
        down.new_empty(x.shape),
        down.new_empty(*tokens, rank),
        down.new_empty(*tokens, rank),
        down.new_empty(tokens[0], rank, dtype=wide),
        down.new_empty(tokens[0], dtype=wide),
        x.new_empty(0, dtype=wide) if learned is None else learned.new_empty(tokens[0]),
    )


_factors = define(
    "fused_frequency_adapter_factors(Tensor x, Tensor dy, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, "
    f"Tensor router, Tensor router_bias, Tensor scale, {EDGE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_factors,
    _fake_factors,
)


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
    check_grid(x, grid, cutoff, band)
    found = _factors(
        x, dy, down, down_bias, up, up_bias, router, router_bias, scale, *as_edge(grid, cutoff, band, tau)
    )  # fmt: skip
    return Factors(*found[:-1], found[-1] if isinstance(cutoff, Tensor) else None)
