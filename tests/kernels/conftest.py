"""Shared by the kernel tests: the accuracy rule, and the interpreter made to round as the hardware does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cegate.kernels._support import HAS_TRITON, is_interpreted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: on the CPU through the interpreter, and on the GPU compiled (``pytest -m gpu``)."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if (request.param == "cpu") != is_interpreted():
        pytest.skip("one process either interprets the kernels (TRITON_INTERPRET=1) or compiles them")
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def _round_bfloat16_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16; every GPU rounds to nearest even."""
    if not (HAS_TRITON and is_interpreted()):
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert


def _outputs_and_gradients(
    op: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The output of ``op(*tensors)`` and the gradient of each tensor under a fixed random probe."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    y = op(*leaves)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # the probe is rounded first, so that every dtype differentiates the same sum
    probe = probe.to(tensors[0].dtype).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, probe)]


def _assert_as_accurate(op, reference, tensors: Sequence[Tensor], *, exact=None, factor: float = 2.0) -> None:
    """``op`` errs at most ``factor`` times as much as ``reference`` in the same dtype, output and every gradient.

    Both are judged against ``exact`` (default: the reference) in float64. One unit in the last place of the largest
    value is always allowed: a single rounding may fall either way. The gradient of a scalar is an inner product of the
    probe with the derivative of y and may cancel; its unit is that of the two norms.
    """
    exact = exact or reference
    ours = _outputs_and_gradients(op, tensors)
    theirs = _outputs_and_gradients(reference, tensors)
    truth = _outputs_and_gradients(exact, tensors, torch.float64)
    for place, (mine, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert mine.isfinite().all(), f"tensor {place} (0 is the output) is not finite"
        if not true.numel():
            continue
        error, allowed = (mine.double() - true).abs().max(), (other.double() - true).abs().max()
        is_scalar = place and not tensors[place - 1].ndim
        scale = _inner_product_scale(exact, tensors, place - 1) if is_scalar else true.abs().max()
        allowed = factor * allowed + torch.finfo(mine.dtype).eps * scale
        assert error <= allowed, f"tensor {place} (0 is the output) is off by {error:.3g}, allowed {allowed:.3g}"


def _inner_product_scale(exact, tensors: Sequence[Tensor], place: int) -> Tensor:
    """|probe| * |dy / d scalar| in float64, the derivative as a difference."""
    step = 1e-4
    wide = [tensor.detach().double() for tensor in tensors]
    moved = [tensor + step if other == place else tensor for other, tensor in enumerate(wide)]
    change = (exact(*moved) - exact(*wide)) / step
    return change.norm() * change.numel() ** 0.5


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    return _assert_as_accurate


@pytest.fixture
def outputs_and_gradients() -> Callable[..., list[Tensor]]:
    return _outputs_and_gradients
