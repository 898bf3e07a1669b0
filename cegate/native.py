"""The compiled extension: loading it, and what its operators need in Python (autograd, shapes for ``torch.compile``).

``csrc/ops.cpp`` registers ``torch.ops.cegate``; this module gives these operators gradients and fake kernels. Without
the extension :data:`EXTENSION` is None and :data:`REASON` says why; one that is there and does not load is an error.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cegate import __version__
from cegate.errors import BackendError

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


def _refuse_second_derivatives(op: str) -> None:
    """Gradients are on within a backward exactly if its own gradient is wanted, and that would be silently zero."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise BackendError(f"{op}: the C++ form has no second derivatives; use backend='torch'")


def _low_pass_setup(ctx, inputs, output) -> None:
    _, *tensors, ctx.coupled = inputs
    ctx.save_for_backward(*tensors)


def _low_pass_backward(ctx, dy: Tensor):
    return torch.ops.cegate.low_pass(dy, *ctx.saved_tensors, ctx.coupled), None, None, None, None, None


def _frequency_setup(ctx, inputs, output) -> None:
    x, down, _, up, up_bias, router, _, scale, *filters, ctx.coupled, adapters = inputs
    ctx.adapters = list(adapters)
    ctx.save_for_backward(x, output[1], down, up, up_bias, router, scale, *filters)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _frequency_backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 14
    _refuse_second_derivatives("frequency_adapter")
    wants_x, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:8])
    gradients = torch.ops.cegate.frequency_adapter_backward(
        dy, *ctx.saved_tensors, ctx.coupled, ctx.adapters, wants_x, wants_weights
    )
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:8], strict=True)]
    return (*wanted, None, None, None, None, None, None)


def _low_rank_setup(ctx, inputs, output) -> None:
    x, down, up, _, _, _, ctx.activation, ctx.scale, adapters, *_ = inputs
    ctx.adapters = list(adapters)
    ctx.save_for_backward(x, output[1], down, up)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _low_rank_backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 10
    _refuse_second_derivatives("low_rank")
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


def _operator(name: str, setup: Callable, backward: Callable, **alone: bool) -> Callable:
    """An operator of the extension with its gradient; ``alone`` are options for a call that no backward follows.

    ``register_autograd`` is what ``torch.compile`` traces; called eagerly it costs 20 us more per forward and backward
    than the same two functions in a plain autograd function, as much as a small module's own work.
    """
    operator = getattr(torch.ops.cegate, name).default
    torch.library.register_autograd(f"cegate::{name}", backward, setup_context=setup)

    def forward(ctx, *inputs):
        output = operator(*inputs)
        setup(ctx, inputs, output)
        return output

    steps = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), steps)

    def call(*inputs):
        if torch.compiler.is_compiling():
            return operator(*inputs)
        wants = torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in inputs)
        return function.apply(*inputs) if wants else operator(*inputs, **alone)

    return call


class LowRankQV(torch.autograd.Function):
    """``low_rank_qv_``: the gradient of qkv passes straight through. Mutation has no place in ``register_autograd``."""

    @staticmethod
    def forward(ctx, qkv, x, down_q, up_q, down_v, up_v, scale, adapters):
        hidden = torch.ops.cegate.low_rank_qv_(qkv, x, down_q, up_q, down_v, up_v, scale, adapters)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(x, hidden, down_q, up_q, down_v, up_v)
        ctx.scale, ctx.adapters = scale, list(adapters)
        return qkv

    @staticmethod
    def backward(ctx, dqkv):
        _refuse_second_derivatives("low_rank_qv_")
        _, wants_x, *wants = ctx.needs_input_grad[:6]
        gradients = torch.ops.cegate.low_rank_qv_backward(
            dqkv, *ctx.saved_tensors, ctx.scale, ctx.adapters, wants_x, any(wants)
        )
        wanted = [g if needed else None for g, needed in zip(gradients, (wants_x, *wants), strict=True)]
        return (dqkv, *wanted, None, None)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("cegate::low_pass")
    def _(x, rows, columns, row_weights, column_weights, coupled):
        return _like(x)

    @fake("cegate::frequency_adapter")
    def _(x, down, *rest):
        return _like(x), x.new_empty(x.shape[0], x.shape[1], 3 * down.shape[-2] + 3)

    @fake("cegate::frequency_adapter_backward")
    def _(dy, x, active, down, up, up_bias, router, scale, rows, columns, rw, cw, coupled, adapters, wants_x, wants):
        lead = down.shape[:-3]
        biases = down.new_empty(*lead, 3, down.shape[-2]), down.new_empty(*lead, 3)
        weights = (down, biases[0], up, up_bias, router, biases[1], scale)
        return (_like(x, wants_x), *(_like(weight, wants) for weight in weights))

    @fake("cegate::frequency_adapter_factors")
    def _(x, dy, down, *rest):
        width = 3 * down.shape[-2] + 3
        hidden, sums = x.new_empty(*x.shape[:-1], width), x.new_empty(x.shape[0], width, dtype=torch.float32)
        return _like(x), hidden, torch.empty_like(hidden), sums, sums.new_empty(x.shape[0])

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

    @fake("cegate::low_rank_qv_")
    def _(qkv, x, down_q, up_q, down_v, up_v, scale, adapters, keeps=True):
        return x.new_empty(*x.shape[:-1], 2 * down_q.shape[-2]) if keeps else x.new_empty(0)

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
    if torch._C._are_functorch_transforms_active():
        reasons.append("torch.func transforms are active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    return reasons


if EXTENSION is not None:
    low_pass = _operator("low_pass", _low_pass_setup, _low_pass_backward)
    frequency_adapter = _operator("frequency_adapter", _frequency_setup, _frequency_backward)
    low_rank = _operator("low_rank", _low_rank_setup, _low_rank_backward, keeps=False)
    _register_fakes()
