"""The fused operators: the only door to ``kernels/`` and ``csrc/``.

Every operator takes ``backend``: ``"torch"`` (plain PyTorch, runs anywhere), ``"triton"`` (GPU), ``"cpp"`` (CPU, the
compiled extension) or ``"auto"``, which takes the fastest of them that can run the given tensors and never fails for
lack of one. A backend that is named and cannot run raises :class:`~cegate.errors.BackendError` with every reason.
Nothing is compiled at import.

``adapters`` lets one batch carry samples of several adapters: weights then have a leading axis A, and ``adapters[b]``
is the index of sample b's adapter, or -1 where the operator is off for it (see :mod:`cegate.dispatch`). None or empty
means no axis A, and on for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from cegate import native
from cegate.errors import BackendError
from cegate.kernels._support import KernelUnavailableError, compute_dtype
from cegate.kernels.deformable import deformable_attention as _deformable_attention
from cegate.kernels.deformable import level_table as level_table
from cegate.kernels.frequency_adapter import Factors
from cegate.kernels.frequency_adapter import frequency_adapter as _frequency_adapter
from cegate.kernels.frequency_adapter import frequency_adapter_factors as _frequency_adapter_factors
from cegate.kernels.low_pass import check_grid
from cegate.kernels.low_pass import low_pass as _low_pass
from cegate.kernels.low_rank import low_rank as _low_rank
from cegate.kernels.low_rank import low_rank_factors as _low_rank_factors
from cegate.kernels.low_rank import low_rank_qv_ as _low_rank_qv_
from cegate.kernels.residual_norm import residual_norm as _residual_norm
from cegate.kernels.sum_squared_gradients import sum_squared_bias_gradients as _sum_squared_bias_gradients
from cegate.kernels.sum_squared_gradients import sum_squared_gradients as _sum_squared_gradients

Backend = Literal["auto", "torch", "triton", "cpp"]
Band = Literal["official", "symmetric"]
Grid = tuple[int, int]

BACKENDS = ("auto", "torch", "triton", "cpp")
TAU = 0.5
_FUSED: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """Inside, and in this thread alone, models call `residual_norm` and `deformable_attention` where they otherwise run
    PyTorch's own operators, which on a GPU differ by rounding: kernels that no GPU has run yet."""
    token = _FUSED.set(True)
    try:
        yield
    finally:
        _FUSED.reset(token)


def is_fused() -> bool:
    """Whether this is inside `fused`. Not while a compiler traces: it fuses itself, and torch's of 2.11 cannot ask."""
    return not torch.compiler.is_compiling() and _FUSED.get()


def _runs_in_cpp(op: str, backend: str, tensors: dict[str, Tensor], limits: Sequence[str] = ()) -> bool:
    """Whether the extension takes the call; ``limits`` are the caller's own reasons against it."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    x = next(iter(tensors.values()))
    if backend not in ("auto", "cpp") or (backend == "auto" and x.device.type != "cpu"):
        return False
    reasons = [*limits, *native.obstacles(tensors)]
    if compute_dtype(x) != x.dtype:
        reasons.append("autocast is on")
    if reasons and backend == "cpp":
        raise BackendError(f"{op}: backend='cpp' cannot run: {'; '.join(reasons)}; use backend='auto'")
    return not reasons


def _kernel(function: Callable, x: Tensor, *args, **options):
    """Call an operator of ``kernels/``, which knows nothing of cegate's errors.

    Triton launches on the current device, whichever the tensors are on; a compiled graph sees to that itself.
    """
    elsewhere = x.is_cuda and not torch.compiler.is_compiling()
    try:
        with torch.cuda.device(x.device) if elsewhere else nullcontext():
            return function(x, *args, **options)
    except KernelUnavailableError as error:
        raise BackendError(str(error)) from error


def _no_cpp(op: str, backend: str) -> str:
    if backend == "cpp":
        raise BackendError(f"{op}: backend='cpp' cannot run: it has no C++ form; use backend='auto'")
    return backend


def _runs(adapters: Sequence[int]) -> list[tuple[int, slice]]:
    """(adapter, samples) of neighbours with equal adapters; slices, so that no sample is copied to run them.

    Without a sample there is still a run: outputs get their shape and weights their gradient, zero.
    """
    runs, first = [], 0
    for adapter, group in groupby(adapters):
        after = first + sum(1 for _ in group)
        runs.append((adapter, slice(first, after)))
        first = after
    return runs or [(0, slice(0, 0))]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _checked_adapters(op: str, adapters: Sequence[int] | None, x: Tensor, stacked: int) -> Sequence[int]:
    adapters = adapters or []
    if len(adapters) != len(x):
        raise ValueError(f"{op}: adapters has {len(adapters)} entries for {len(x)} samples")
    for b, adapter in enumerate(adapters):
        if not -1 <= adapter < stacked:
            raise ValueError(f"{op}: adapters[{b}] is {adapter}, accepted are -1 (off) to {stacked - 1}")
    return adapters


def _own(weights: Sequence[Tensor | None], adapter: int, stacked: bool) -> list[Tensor | None]:
    """The weights of one adapter."""
    return [weight[adapter] if stacked and weight is not None else weight for weight in weights]


def low_pass(
    x: Tensor,
    grid: Grid,
    cutoff: float | Tensor = 0.3,
    band: Band = "official",
    *,
    tau: float = TAU,
    backend: Backend = "auto",
) -> Tensor:
    """Keep the low spatial frequencies of a token grid, channel by channel; linear and self-adjoint.

    Args:
        x: [B, H*W, C], tokens row by row; any strides.
        grid: (H, W).
        cutoff: share rho of the band, 0..1: frequencies -c .. c-1 of both axes stay, c = int(min(H, W) * rho // 2). A
            scalar tensor is learnable: the edge is then sigmoid((c - |k|) / tau), c = min(H, W) * rho / 2.
        band: "official" (-c .. c-1) or "symmetric" (-c .. c); without effect on a tensor cutoff.
        tau: width of the learnable edge in frequency bins.
        backend: see the module.

    Returns:
        [B, H*W, C] in the dtype of x.

    Raises:
        ValueError: grid, cutoff or band do not fit.
        BackendError: the named backend cannot run.
    """
    if _runs_in_cpp("low_pass", backend, {"x": x}, _learnable(cutoff)):
        check_grid(x, grid, cutoff, band)
        return native.low_pass(x, *grid, float(cutoff), band)
    return _kernel(_low_pass, x, grid, cutoff, band, tau=tau, backend=backend)


def _learnable(cutoff: float | Tensor) -> Sequence[str]:
    return ("a learnable cutoff has no C++ form",) if isinstance(cutoff, Tensor) else ()


def frequency_adapter(
    x: Tensor,
    grid: Grid,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    router: Tensor,
    router_bias: Tensor,
    scale: Tensor,
    cutoff: float | Tensor = 0.3,
    band: Band = "official",
    *,
    tau: float = TAU,
    prefix: int = 0,
    adapters: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x plus the gated sum of three bottleneck experts that see x, its low-pass and its high-pass.

    Args:
        x: [B, prefix + H*W, C], patch tokens row by row behind the prefix; any strides.
        grid: (H, W).
        down, down_bias: [3, d, C], [3, d]; experts in the order spatial, low, high.
        up, up_bias: [3, C, d], [3, C].
        router, router_bias: [3, C], [3]; logits of the gates.
        scale: [] factor of the mixture.
        cutoff, band, tau: as in :func:`low_pass`.
        prefix: number of tokens before the patches (class token, registers), which pass through.
        adapters: adapter of each sample, see the module; weights then are [A, 3, d, C] and so on, a learnable cutoff
            [A].
        backend: see the module.

    Returns:
        [B, prefix + H*W, C] in the dtype of x: ``x + scale * mixture``. Weights are cast to that dtype.

    Raises:
        ValueError: shapes, cutoff, band or adapters do not fit.
        BackendError: the named backend cannot run.

    Source: Earth-Adapter, arXiv:2504.06220.
    """
    weights = (down, down_bias, up, up_bias, router, router_bias, torch.as_tensor(scale, device=x.device))
    if _runs_in_cpp("frequency_adapter", backend, {"x": x}, _learnable(cutoff)):
        cast = [weight if weight.dtype == x.dtype else weight.to(x.dtype) for weight in weights]
        check_grid(x, grid, cutoff, band, prefix)
        mixed = native.frequency_adapter(
            x[:, prefix:] if prefix else x, *cast, *grid, float(cutoff), band, adapters or []
        )[0]
        return torch.cat([x[:, :prefix], mixed], dim=1) if prefix else mixed
    rest = {"cutoff": cutoff, "band": band, "tau": tau, "prefix": prefix, "backend": backend}
    stacked = down.ndim == 4
    if not (adapters or stacked):
        return _kernel(_frequency_adapter, x, grid, *weights, **rest)
    adapters = _checked_adapters("frequency_adapter", adapters, x, len(down) if stacked else 1)
    own_cutoffs = isinstance(cutoff, Tensor) and cutoff.ndim == 1

    def run(adapter: int, samples: slice) -> Tensor:
        if adapter < 0:
            return x[samples]
        own = rest | {"cutoff": cutoff[adapter]} if own_cutoffs else rest
        return _kernel(_frequency_adapter, x[samples], grid, *_own(weights, adapter, stacked), **own)

    return _joined([run(*part) for part in _runs(adapters)])


def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    base: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Literal["gelu", "relu"] | None = None,
    scale: float = 1.0,
    adapters: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``base + scale * up(activation(down(x)))``: LoRA without activation, a bottleneck adapter with one.

    Args:
        x: [..., C]; any strides. [B, T, C] with ``adapters``.
        down, down_bias: [r, C], [r].
        up, up_bias: [out, r], [out]; the bias is scaled too.
        base: [..., out] what the result is added to, not changed; any strides, for example a part of a qkv output.
        activation: None, "relu" or "gelu" (exact).
        scale: factor of the low-rank part.
        adapters: adapter of each sample, see the module; weights then are [A, r, C] and so on.
        backend: see the module.

    Returns:
        [..., out] in the dtype of base, or of x without one; zeros without base where the operator is off.

    Raises:
        ValueError: shapes, activation or adapters do not fit.
        BackendError: the named backend cannot run.

    Source: LoRA, arXiv:2106.09685; AdaptFormer, arXiv:2205.13535.
    """
    named = {"x": x} if base is None else {"x": x, "base": base}
    if activation in native.ACTIVATIONS and _runs_in_cpp("low_rank", backend, named):
        return _low_rank_cpp(x, down, up, base, down_bias, up_bias, native.ACTIVATIONS[activation], scale, adapters)
    rest = {"activation": activation, "scale": scale, "backend": backend}
    stacked = down.ndim == 3
    if not (adapters or stacked):
        biases = {"base": base, "down_bias": down_bias, "up_bias": up_bias}
        return _kernel(_low_rank, x, down, up, **biases, **rest)
    adapters = _checked_adapters("low_rank", adapters, x, len(down) if stacked else 1)
    base = x.new_zeros(*x.shape[:-1], up.shape[-2]) if base is None else base

    def run(adapter: int, samples: slice) -> Tensor:
        if adapter < 0:
            return base[samples]
        own_down, own_up, *own = _own((down, up, down_bias, up_bias), adapter, stacked)
        biases = {"down_bias": own[0], "up_bias": own[1]}
        return _kernel(_low_rank, x[samples], own_down, own_up, base=base[samples], **biases, **rest)

    return _joined([run(*part) for part in _runs(adapters)])


def _low_rank_cpp(x, down, up, base, down_bias, up_bias, activation, scale, adapters) -> Tensor:
    weights = [w if w is None or w.dtype == x.dtype else w.to(x.dtype) for w in (down, up, down_bias, up_bias)]
    down, up, down_bias, up_bias = weights
    shape = (*x.shape[:-1], up.shape[-2])
    if base is not None and base.shape != shape:
        raise ValueError(f"low_rank: base has shape {tuple(base.shape)}, expected {shape}")
    if x.ndim != 3:
        x = x.reshape(1, -1, x.shape[-1])
        base = None if base is None else base.reshape(1, -1, base.shape[-1])
    y, _ = native.low_rank(x, down, up, base, down_bias, up_bias, activation, float(scale), adapters or [])
    return y if len(shape) == 3 else y.view(shape)


def low_rank_qv_(
    qkv: Tensor,
    x: Tensor,
    down_q: Tensor,
    up_q: Tensor,
    down_v: Tensor,
    up_v: Tensor,
    scale: float = 1.0,
    *,
    adapters: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """LoRA on the query and value parts of a fused qkv output, added in place.

    Args:
        qkv: [B, T, 3 out] contiguous, the output of the fused projection; changed and returned. No leaf that wants a
            gradient.
        x: [B, T, C], what the projection saw.
        down_q, down_v: [r, C].
        up_q, up_v: [out, r].
        scale: factor of the low-rank part.
        adapters: adapter of each sample, see the module; weights then are [A, r, C] and so on.
        backend: see the module.

    Returns:
        qkv.

    Raises:
        ValueError: shapes or adapters do not fit, or qkv is not contiguous.
        BackendError: the named backend cannot run.
    """
    weights = (down_q, up_q, down_v, up_v)
    if qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("low_rank_qv_: qkv is a leaf that wants a gradient and cannot be changed in place; clone it")
    limits = () if x.ndim == 3 else (f"x has {x.ndim} axes, it takes [B, T, C]",)
    if _runs_in_cpp("low_rank_qv_", backend, {"qkv": qkv, "x": x}, limits):
        cast = [weight if weight.dtype == x.dtype else weight.to(x.dtype) for weight in weights]
        return native.low_rank_qv_(qkv, x, *cast, float(scale), adapters or [])
    stacked = down_q.ndim == 3
    if not (adapters or stacked):
        return _kernel(_low_rank_qv_, qkv, x, *weights, scale, backend=backend)
    adapters = _checked_adapters("low_rank_qv_", adapters, x, len(down_q) if stacked else 1)
    for adapter, samples in _runs(adapters):
        if adapter >= 0:  # part of qkv is a view: added to in place
            own = _own(weights, adapter, stacked)
            _kernel(_low_rank_qv_, qkv[samples], x[samples], *own, scale, backend=backend)
    return qkv


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """``y = x + scale * branch`` and the layer norm of y over its last axis; one kernel where the weights are frozen.

    Args:
        x: [..., C].
        branch: as x, of any floating dtype; None: y is x.
        scale, weight, bias: [C]; None: 1, 1, 0.
        eps: added to the variance.
        backend: see the module; there is no C++ form.

    Returns:
        y [..., C] in the dtype of x, rounded as PyTorch rounds it, and its norm in the dtype of products (autocast's
        where it is on).

    Raises:
        BackendError: the named backend cannot run.
    """
    chosen = _no_cpp("residual_norm", backend)
    return _kernel(_residual_norm, x, branch, scale, weight, bias, eps, backend=chosen)


def deformable_attention(
    values: Tensor,
    places: Tensor,
    weights: Tensor,
    sizes: Sequence[Grid],
    *,
    table: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over levels and points of weight times the value at a place, bilinear between pixels, 0 outside the map.

    Args:
        values: [B, M, heads, d], the pixels of all levels one behind the other, row by row.
        places: [B, N, heads, L, P, 2] x and y, -1..1 across the image.
        weights: [B, N, heads, L, P].
        sizes: (height, width) of the L levels.
        table: `level_table` of the sizes, on the device, where it is at hand.
        backend: see the module; there is no C++ form.

    Returns:
        [B, N, heads, d].

    Raises:
        ValueError: M is not the number of pixels of all levels.
        BackendError: the named backend cannot run.

    Source: Deformable DETR, Zhu et al., ICLR 2021.
    """
    chosen = _no_cpp("deformable_attention", backend)
    return _kernel(_deformable_attention, values, places, weights, sizes, table=table, backend=chosen)


def _factors_run_in_cpp(op: str, x: Tensor, dy: Tensor, down: Tensor, limits: Sequence[str] = ()) -> bool:
    """Factors have the dtype of the weights, whatever that of the tokens is: the extension takes what needs no cast."""
    return _runs_in_cpp(op, "auto", {"x": x, "dy": dy, "down": down}, limits)


def low_rank_factors(
    x: Tensor,
    dy: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    activation: Literal["gelu", "relu"] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of ``low_rank`` as (dx, dpre, hidden), from which each sample's weight gradients follow."""
    if activation in native.ACTIVATIONS and _factors_run_in_cpp("low_rank_factors", x, dy, down):
        code = native.ACTIVATIONS[activation]
        return torch.ops.cegate.low_rank_factors(x, dy, down, up, down_bias, code, float(scale))
    return _low_rank_factors(x, dy, down, up, down_bias=down_bias, activation=activation, scale=scale)


def frequency_adapter_factors(
    x: Tensor,
    dy: Tensor,
    grid: Grid,
    *weights: Tensor,
    cutoff: float | Tensor = 0.3,
    band: Band = "official",
) -> Factors:
    """Backward of ``frequency_adapter`` as :class:`~cegate.kernels.frequency_adapter.Factors`, sample by sample."""
    if _factors_run_in_cpp("frequency_adapter_factors", x, dy, weights[0], _learnable(cutoff)):
        check_grid(x, grid, cutoff, band)
        found = native.frequency_adapter_factors(x, dy, *weights, *grid, float(cutoff), band)
        return Factors(*found, dcutoff=None)
    return _frequency_adapter_factors(x, dy, grid, *weights, cutoff, band, tau=TAU)


def sum_squared_gradients(inputs: Tensor, grads: Tensor, *, reduce: bool = False, backend: Backend = "auto") -> Tensor:
    """Sum over samples of the elementwise square of each sample's own weight gradient of a linear map.

    Args:
        inputs: [B, T, in], what went into the map.
        grads: [B, T, out], gradient of its output, from the *sum* of per-sample losses (a mean would be off by B^2).
        reduce: sum over the weight's elements as well.
        backend: see the module; there is no C++ form.

    Returns:
        ``sum_b (grads_b^T inputs_b)^2``: [out, in], or [] with ``reduce``; float32 (float64 for float64). Not
        differentiable.

    Raises:
        ValueError: B or T differ.
        BackendError: the named backend cannot run.
    """
    chosen = _no_cpp("sum_squared_gradients", backend)
    return _kernel(_sum_squared_gradients, inputs, grads, reduce=reduce, backend=chosen)


def sum_squared_bias_gradients(grads: Tensor, *, reduce: bool = False) -> Tensor:
    """The same for a bias: ``sum_b (sum_t grads_bt)^2``, [out] or []; for a scalar weight pass grads [B, T, 1].

    Args:
        grads: [B, T, out], from the sum of per-sample losses.
        reduce: sum over the bias's elements as well.
    """
    return _sum_squared_bias_gradients(grads, reduce=reduce)


def backends() -> dict[str, str]:
    """Backend -> what is loaded, or why it is not. One line each, for ``cegate inspect --backends``."""
    return {"torch": _torch_state(), "triton": _triton_state(), "cpp": _cpp_state()}


def _torch_state() -> str:
    isa = torch.backends.cpu.get_cpu_capability()
    return f"loaded: torch {torch.__version__}, {torch.get_num_threads()} threads, {isa}"


def _triton_state() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not loaded: {error}"
    if torch.cuda.is_available():
        return f"loaded: triton {triton.__version__} on {torch.cuda.get_device_name()}"
    return f"idle: triton {triton.__version__}, but no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def _cpp_state() -> str:
    if native.EXTENSION is None:
        return f"not loaded: {native.REASON}"
    return f"loaded: cegate._C {native.EXTENSION.version}, loops for {native.EXTENSION.cpu_capability()}"
