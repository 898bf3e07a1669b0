"""What every kernel file shares: which backend runs, in which dtype, and how an operator is registered."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "torch", "triton")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


class KernelUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run; the message holds every reason."""


def is_interpreted() -> bool:
    """Whether Triton kernels run on the CPU through its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_obstacles(dtypes: Sequence[torch.dtype], limits: Sequence[str], tensors: dict[str, Tensor]) -> list[str]:
    """Every reason why the Triton kernel of an op cannot take these tensors; empty if it can."""
    reasons = list(limits)
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            reasons.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, it takes {accepted}")
        if tensor.device.type == "cpu" and not is_interpreted():
            reasons.append(f"{name} is on the CPU (TRITON_INTERPRET=1 runs it there, slowly)")
        elif tensor.device.type not in ("cpu", "cuda"):
            reasons.append(f"{name} is on {tensor.device.type}, it takes cuda")
        elif tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < MIN_CAPABILITY:
            reasons.append(f"{name} is on a GPU older than compute capability 8.0")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        reasons.append("the tensors are on different devices")
    return reasons + transforms()


def transforms() -> list[str]:
    """Why only plain PyTorch can run now: it is differentiated in ways that no operator of ours was written for."""
    reasons = []
    if torch._C._are_functorch_transforms_active():
        reasons.append("torch.func transforms are active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    return reasons


if HAS_TRITON:
    import triton
    import triton.language as tl

    INTERPRETED = tl.constexpr(is_interpreted())

    @triton.jit
    def dot(a, b, acc):
        """acc + a @ b: a rounded to the dtype of b, sums in float32; float32 operands stay float32, never TF32."""
        a = a.to(b.dtype)
        if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")


def pick_backend(
    op: str,
    backend: str,
    dtypes: Sequence[torch.dtype] = HALF_AND_SINGLE,
    limits: Sequence[str] = (),
    **tensors: Tensor,
) -> str:
    """Return ``"torch"`` or ``"triton"``.

    Args:
        op: name of the op, for the message.
        backend: "auto" takes Triton for GPU tensors it supports and falls back quietly; others are taken at their word.
        dtypes: what the Triton kernel accepts.
        limits: op-specific reasons against Triton found by the caller.
        tensors: the arguments that decide.

    Raises:
        ValueError: the backend has no such name.
        KernelUnavailableError: ``backend="triton"`` cannot run; every reason is listed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and not all(tensor.is_cuda for tensor in tensors.values())):
        return "torch"
    reasons = triton_obstacles(dtypes, limits, tensors)
    if reasons and backend == "triton":
        raise KernelUnavailableError(f"{op}: backend='triton' cannot run: {'; '.join(reasons)}; use backend='auto'")
    return "torch" if reasons else "triton"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of ``x``, or autocast's where it is on (as for ``torch.nn.Linear``)."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pad(size: int) -> int:
    """Smallest power of two that holds ``size`` and suits a tensor core: at least 16."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def dot_block(dtype: torch.dtype) -> int:
    """Depth of one step of a matrix product; float32 runs without tensor cores and holds its operands in registers."""
    return 16 if dtype == torch.float32 else 64


def without_autocast(x: Tensor):
    """Context in which products have the dtype of their operands, whatever autocast says outside."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


LIBRARY = torch.library.Library("cegate", "FRAGMENT")
PLAIN = (Tensor, torch.nn.Parameter)


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Register ``cegate::<schema>`` and return the function that calls it.

    The compiler sees the schema and ``fake`` alone. Whatever ``run`` does (launches, look-ups by size, strides of its
    own memory) happens when the operator is called, with the sizes, strides and numbers of that call.

    Args:
        run: computes contiguous outputs (or the strides that ``fake`` gives) that share no memory with an input; a
            result that nobody wants is an empty tensor.
        fake: the same outputs by shape, dtype and strides.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cegate::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.cegate, name).default

    def call(*inputs):
        return operator(*inputs) if is_traced(inputs[0]) else run(*inputs)

    return call


def is_traced(x: Tensor) -> bool:
    """Whether a compiler looks on: by its own word, or by tensors that stand for others."""
    return torch.compiler.is_compiling() or type(x) not in PLAIN


def differentiable(
    name: str, run: Callable, setup: Callable, backward: Callable, alone: Callable | None = None
) -> Callable:
    """Give ``cegate::<name>`` a gradient and return the function that calls it.

    ``register_autograd`` is what the compiler traces; called eagerly it costs 20 us more per forward and backward than
    the same functions in a plain autograd function, as much as a small module's own work.

    Args:
        run: computes the operator in an eager call.
        setup: ``(ctx, inputs, output)``, saves what ``backward`` needs.
        backward: ``(ctx, *gradients)``, one gradient for each input.
        alone: in place of ``run`` where no backward follows.
    """
    alone = alone or run
    operator = getattr(torch.ops.cegate, name).default
    torch.library.register_autograd(f"cegate::{name}", backward, setup_context=setup, lib=LIBRARY)

    def forward(ctx, *inputs):
        output = run(*inputs)
        setup(ctx, inputs, output)
        return output

    steps = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), steps)

    def call(*inputs):
        if is_traced(inputs[0]):
            return operator(*inputs)
        if torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in inputs):
            return function.apply(*inputs)
        return alone(*inputs)

    return call


def refuse_second_derivatives(op: str) -> None:
    """Gradients are on within a backward exactly if its own gradient is wanted, and that would be silently wrong.

    Raises:
        NotImplementedError: they are on.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(f"{op}: its gradient has no derivative of its own; torch.func.grad of it has")
