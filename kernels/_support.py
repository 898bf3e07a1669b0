"""What every kernel file shares: is Triton there, which backend runs, in which dtype it computes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

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


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` as the last step of an autograd function.

    Under torch.compile, torch 2.11 loses the gradient of a function whose output is a conversion that does nothing.
    """
    return x if x.dtype == dtype else x.to(dtype)
