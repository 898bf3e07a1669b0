"""The compiled extension: loading it, and what its operators need in Python (autograd, shapes for ``torch.compile``).

``csrc/ops.cpp`` registers ``torch.ops.cegate``; this module gives these operators gradients and fake kernels. Without
the extension :data:`EXTENSION` is None and :data:`REASON` says why; one that is there and does not load is an error.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cegate import __version__
from cegate.errors import BackendError
from cegate.kernels._support import define, differentiable, is_traced, refuse_second_derivatives, transforms
from cegate.kernels.low_pass import make_filter

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}
MIN_TORCH = (2, 11)


def _installed_file() -> Path | None:
    """The extension of an installed cegate; the source folder of a checkout, imported instead, has none of its own."""
    # all of them: a build leaves an egg-info in the checkout that hides the installed distribution
    for distribution in importlib.metadata.distributions(name="cegate"):
        for file in distribution.files or []:
            if file.parent.name == "cegate" and file.name.startswith("_C.") and file.suffix in (".so", ".pyd"):
                path = Path(str(file.locate()))
                if path.is_file() and file.name.removeprefix("_C") in importlib.machinery.EXTENSION_SUFFIXES:
                    return path
    return None


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason.

    Raises:
        BackendError: the file is there but does not load: undefined symbols, another interpreter, a torn build.
    """
    spec = importlib.util.find_spec("cegate._C")
    if spec is None and (path := _installed_file()) is not None:
        spec = importlib.util.spec_from_file_location("cegate._C", path)
    if spec is None:
        return None, "the extension cegate._C was not built (pip install -v shows why; it needs a C++ compiler)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return None, f"torch {torch.__version__} is older than 2.11, the first with the ABI the extension is built for"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BackendError(
            f"{spec.origin} is there but does not load ({error}); reinstall cegate, or delete it to run without"
        ) from error
    if module.version != __version__:
        return None, f"{spec.origin} was built for cegate {module.version}, this is {__version__}; install again"
    sys.modules["cegate._C"] = module
    return module, ""


EXTENSION, REASON = _load()


def _like(tensor: Tensor, wanted: bool = True) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else tensor.new_empty(0)


def _filter(x: Tensor, height: int, width: int, cutoff: float, band: str) -> tuple:
    """rows, columns, row_weights, column_weights, coupled."""
    kept = make_filter(x, (height, width), cutoff, band, 0.0)
    return kept.rows, kept.columns, kept.row_weights, kept.column_weights, kept.coupled


# C++ takes a filter as matrices; these operators take the grid, so that one compiled graph holds for every grid
GRID = "SymInt height, SymInt width, float cutoff, str band"


def _low_pass_run(x: Tensor, *grid) -> Tensor:
    return torch.ops.cegate.low_pass(x, *_filter(x, *grid))


def _low_pass_setup(ctx, inputs, output) -> None:
    _, *ctx.grid = inputs


def _low_pass_backward(ctx, dy: Tensor):
    return low_pass(dy, *ctx.grid), None, None, None, None


def _frequency_run(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *weights, height, width, cutoff, band, adapters = rest
    return torch.ops.cegate.frequency_adapter(x, *weights, *_filter(x, height, width, cutoff, band), adapters)


def _frequency_fake(x: Tensor, down: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[0], x.shape[1], 3 * down.shape[-2] + 3)


def _frequency_backward_run(dy: Tensor, *rest) -> tuple[Tensor, ...]:
    *saved, height, width, cutoff, band, adapters, wants_x, wants_weights = rest
    kept = _filter(dy, height, width, cutoff, band)
    return torch.ops.cegate.frequency_adapter_backward(dy, *saved, *kept, adapters, wants_x, wants_weights)


def _frequency_backward_fake(dy, x, active, down, up, up_bias, router, scale, *rest) -> tuple[Tensor, ...]:
    *_, wants_x, wants = rest
    lead = down.shape[:-3]
    biases = down.new_empty(*lead, 3, down.shape[-2]), down.new_empty(*lead, 3)
    weights = (down, biases[0], up, up_bias, router, biases[1], scale)
    return _like(x, wants_x), *(_like(weight, wants) for weight in weights)


def _frequency_setup(ctx, inputs, output) -> None:
    x, down, _, up, up_bias, router, _, scale, *ctx.grid, adapters = inputs
    ctx.adapters = list(adapters)
    ctx.save_for_backward(x, output[1], down, up, up_bias, router, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _frequency_backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 13
    refuse_second_derivatives("frequency_adapter")
    wants_x, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:8])
    gradients = _frequency_backward_operator(dy, *ctx.saved_tensors, *ctx.grid, ctx.adapters, wants_x, wants_weights)
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:8], strict=True)]
    return *wanted, None, None, None, None, None


def _frequency_factors_run(x: Tensor, *rest) -> tuple[Tensor, ...]:
    *others, height, width, cutoff, band = rest
    return torch.ops.cegate.frequency_adapter_factors(x, *others, *_filter(x, height, width, cutoff, band))


def _frequency_factors_fake(x, dy, down, *rest) -> tuple[Tensor, ...]:
    width = 3 * down.shape[-2] + 3
    hidden, sums = x.new_empty(*x.shape[:-1], width), x.new_empty(x.shape[0], width, dtype=torch.float32)
    return _like(x), hidden, torch.empty_like(hidden), sums, sums.new_empty(x.shape[0])


def _low_rank_setup(ctx, inputs, output) -> None:
    x, down, up, _, _, _, ctx.activation, ctx.scale, adapters, *_ = inputs
    ctx.adapters = list(adapters)
    ctx.save_for_backward(x, output[1], down, up)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _low_rank_backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 10
    refuse_second_derivatives("low_rank")
    wants_x, wants_down, wants_up, wants_base, wants_down_bias, wants_up_bias, *_ = ctx.needs_input_grad
    dx, ddown, dup, ddown_bias, dup_bias = torch.ops.cegate.low_rank_backward(
        dy,
        *ctx.saved_tensors,
        wants_down_bias,
        wants_up_bias,
        ctx.activation,
        ctx.scale,
        ctx.adapters,
        wants_x,
        wants_down or wants_up or wants_down_bias or wants_up_bias,
    )
    return (
        dx if wants_x else None,
        ddown if wants_down else None,
        dup if wants_up else None,
        dy if wants_base else None,
        ddown_bias if wants_down_bias else None,
        dup_bias if wants_up_bias else None,
        None,
        None,
        None,
        None,
    )


def _qv_run(qkv: Tensor, *rest) -> tuple[Tensor, Tensor]:
    y = qkv.clone(memory_format=torch.contiguous_format)
    return y, torch.ops.cegate.low_rank_qv_(y, *rest)


def _qv_setup(ctx, inputs, output) -> None:
    _, x, *maps, ctx.scale, adapters = inputs
    ctx.adapters = list(adapters)
    ctx.save_for_backward(x, output[1], *maps)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _qv_backward(ctx, dqkv: Tensor | None, *_):
    """The gradient of qkv passes straight through."""
    if dqkv is None:
        return (None,) * 8
    refuse_second_derivatives("low_rank_qv_")
    _, wants_x, *wants = ctx.needs_input_grad[:6]
    gradients = torch.ops.cegate.low_rank_qv_backward(
        dqkv, *ctx.saved_tensors, ctx.scale, ctx.adapters, wants_x, any(wants)
    )
    wanted = [g if needed else None for g, needed in zip(gradients, (wants_x, *wants), strict=True)]
    return dqkv, *wanted, None, None


class _LowRankQV(torch.autograd.Function):
    """``low_rank_qv_`` in place."""

    @staticmethod
    def forward(ctx, qkv, *rest):
        ctx.mark_dirty(qkv)
        _qv_setup(ctx, (qkv, *rest), (qkv, torch.ops.cegate.low_rank_qv_(qkv, *rest)))
        return qkv

    backward = staticmethod(_qv_backward)


def low_rank_qv_(qkv: Tensor, *rest) -> Tensor:
    """Adds to qkv in place; compiled, by a copy that goes where nobody else looks at qkv."""
    if is_traced(qkv):
        return qkv.copy_(_low_rank_qv(qkv, *rest)[0])
    if torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in (qkv, *rest)):
        return _LowRankQV.apply(qkv, *rest)
    torch.ops.cegate.low_rank_qv_(qkv, *rest, keeps=False)
    torch.autograd.graph.increment_version(qkv)
    return qkv


def _low_rank_alone(*inputs) -> tuple[Tensor, Tensor]:
    return torch.ops.cegate.low_rank(*inputs, keeps=False)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("cegate::low_rank")
    def _(x, down, up, base, down_bias, up_bias, activation, scale, adapters, keeps=True):
        pre = x.new_empty(*x.shape[:-1], down.shape[-2]) if keeps else x.new_empty(0)
        return x.new_empty(*x.shape[:-1], up.shape[-2]), pre

    @fake("cegate::low_rank_factors")
    def _(x, dy, down, up, down_bias, activation, scale):
        pre = x.new_empty(*x.shape[:-1], down.shape[-2])
        return _like(x), pre, torch.empty_like(pre)

    @fake("cegate::low_rank_backward")
    def _(dy, x, pre, down, up, down_bias, up_bias, activation, scale, adapters, wants_x, wants):
        biases = down.new_empty(down.shape[:-1]), up.new_empty(up.shape[:-1])
        return (
            _like(x, wants_x),
            _like(down, wants),
            _like(up, wants),
            _like(biases[0], wants and down_bias),
            _like(biases[1], wants and up_bias),
        )

    @fake("cegate::low_rank_qv_backward")
    def _(dqkv, x, hidden, down_q, up_q, down_v, up_v, scale, adapters, wants_x, wants):
        return (_like(x, wants_x), *(_like(weight, wants) for weight in (down_q, up_q, down_v, up_v)))


def obstacles(tensors: dict[str, Tensor]) -> list[str]:
    """Every reason why the operators cannot take these tensors; empty if they can."""
    if EXTENSION is None:
        return [REASON]
    reasons = []
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}, it takes cpu")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, it takes float32, bfloat16")
        elif tensor.dtype != first.dtype:
            reasons.append(f"{name} is {tensor.dtype} and {first_name} {first.dtype}".replace("torch.", ""))
    return reasons + transforms()


if EXTENSION is not None:
    _WEIGHTS = (
        "Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, Tensor router_bias, Tensor scale"
    )
    define(f"low_pass_on_grid(Tensor x, {GRID}) -> Tensor", _low_pass_run, lambda x, *rest: _like(x))
    low_pass = differentiable("low_pass_on_grid", _low_pass_run, _low_pass_setup, _low_pass_backward)
    define(
        f"frequency_adapter_on_grid(Tensor x, {_WEIGHTS}, {GRID}, int[] adapters) -> (Tensor, Tensor)",
        _frequency_run,
        _frequency_fake,
    )
    _frequency_backward_operator = define(
        "frequency_adapter_on_grid_backward(Tensor dy, Tensor x, Tensor active, Tensor down, Tensor up, "
        f"Tensor up_bias, Tensor router, Tensor scale, {GRID}, int[] adapters, bool wants_x, bool wants_weights) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _frequency_backward_run,
        _frequency_backward_fake,
    )
    frequency_adapter = differentiable(
        "frequency_adapter_on_grid", _frequency_run, _frequency_setup, _frequency_backward
    )
    frequency_adapter_factors = define(
        f"frequency_adapter_factors_on_grid(Tensor x, Tensor dy, {_WEIGHTS}, {GRID}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _frequency_factors_run,
        _frequency_factors_fake,
    )
    low_rank = differentiable(
        "low_rank", torch.ops.cegate.low_rank.default, _low_rank_setup, _low_rank_backward, _low_rank_alone
    )
    define(
        "low_rank_qv(Tensor qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, float scale, "
        "int[] adapters) -> (Tensor, Tensor)",
        _qv_run,
        lambda qkv, x, down_q, *rest: (_like(qkv), x.new_empty(*x.shape[:-1], 2 * down_q.shape[-2])),
    )
    _low_rank_qv = differentiable("low_rank_qv", _qv_run, _qv_setup, _qv_backward)
    _register_fakes()
