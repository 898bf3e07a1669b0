"""The C++ operators as citizens of autograd: what is saved, changed in place, or refused because it would be wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from cegate import native, ops
from cegate.errors import BackendError

pytestmark = pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def test_the_stride_of_a_single_token_is_not_taken_for_that_of_a_row():
    base = torch.randn(1, 64, 8)[:, :4].transpose(0, 1)  # [4, 1, 8] whose token axis has a stride that means nothing
    x, down, up = torch.randn(4, 1, 6), torch.randn(3, 6), torch.randn(8, 3)
    ours, plain = (ops.low_rank(x, down, up, base=base, backend=backend) for backend in ("cpp", "torch"))
    torch.testing.assert_close(ours, plain)


def test_gradients_of_a_module_that_is_off_everywhere_are_zero():
    parts = leaves((2, 5, 8), (3, 8), (8, 3), (3, 8), (8, 3))
    y = ops.low_rank_qv_(torch.randn(2, 5, 24), *parts, adapters=[-1, -1], backend="cpp")
    gradients = torch.autograd.grad(y.sum(), parts)
    assert all(torch.equal(gradient, torch.zeros_like(part)) for gradient, part in zip(gradients, parts, strict=True))


def frequency(x: torch.Tensor, backend: str) -> torch.Tensor:
    shapes = ((3, 2, 6), (3, 2), (3, 6, 2), (3, 6), (3, 6), (3,), ())
    return ops.frequency_adapter(x, (2, 2), *(torch.ones(shape) for shape in shapes), 0.9, backend=backend)


SECOND = {
    "low_rank": lambda x, backend: ops.low_rank(
        x, torch.ones(2, 6), torch.ones(6, 2), activation="gelu", backend=backend
    ),
    "low_rank_qv_": lambda x, backend: ops.low_rank_qv_(
        3 * x.repeat(1, 1, 3), x, *[torch.ones(2, 6), torch.ones(6, 2)] * 2, backend=backend
    ),
    "frequency_adapter": frequency,
}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_are_refused_or_right(name, backend):
    (x,) = leaves((1, 4, 6))

    def loss(x: torch.Tensor, backend: str = backend) -> torch.Tensor:
        return SECOND[name](x, backend).square().sum()

    first = torch.autograd.grad(loss(x), x)[0]
    with pytest.raises(NotImplementedError, match=f"{name}: its gradient has no derivative of its own; torch.func"):
        torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(partial(loss, backend="auto"))(x.detach()), first)
    wide, direction = x.detach().double(), torch.randn(1, 4, 6, dtype=torch.float64)
    slope = torch.func.grad(loss) if backend == "torch" else torch.func.grad(partial(loss, backend="auto"))
    _, second = torch.func.jvp(slope, (wide,), (direction,))
    near = [slope(wide + step * direction) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(second, (near[0] - near[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_low_pass_has_second_derivatives():
    (x,) = leaves((1, 12, 2))
    hessian_vector = []
    for backend in ("cpp", "torch"):
        (gradient,) = torch.autograd.grad(
            ops.low_pass(x, (3, 4), 0.9, backend=backend).pow(3).sum(), x, create_graph=True
        )
        hessian_vector += torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(*hessian_vector)


def test_forward_mode_is_left_to_pytorch():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(1, 4, 6), torch.randn(1, 4, 6))
        with pytest.raises(BackendError, match="forward-mode differentiation is active"):
            ops.low_rank(x, torch.ones(2, 6), torch.ones(6, 2), backend="cpp")


def test_a_list_of_adapters_that_changes_later_does_not_change_the_gradient():
    x, down, up = leaves((2, 5, 8), (2, 3, 8), (2, 8, 3))
    gradients = []
    for change in (False, True):
        adapters = [0, 1]
        y = ops.low_rank(x, down, up, adapters=adapters, backend="cpp")
        if change:
            adapters.reverse()
        gradients.append(torch.autograd.grad(y.square().sum(), (x, down, up)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autograd_sees_that_qkv_changed():
    qkv, weight = torch.randn(1, 5, 24), torch.randn(1, 5, 24).requires_grad_()
    y = (qkv * weight).sum()
    halves = [torch.randn(3, 8), torch.randn(8, 3)] * 2
    ops.low_rank_qv_(qkv, torch.randn(1, 5, 8), *halves, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_qkv_may_be_what_the_module_sees():
    qkv, halves = torch.randn(1, 5, 24), [torch.randn(3, 24), torch.randn(8, 3)] * 2
    ours = ops.low_rank_qv_(qkv.clone(), qkv.clone(), *halves, backend="torch")
    torch.testing.assert_close(ops.low_rank_qv_(qkv, qkv, *halves, backend="cpp"), ours)


def test_a_leaf_is_refused_before_it_is_changed():
    (qkv,), halves = leaves((1, 5, 24)), [torch.randn(3, 8), torch.randn(8, 3)] * 2
    before = qkv.detach().clone()
    with pytest.raises(ValueError, match="qkv is a leaf that wants a gradient"):
        ops.low_rank_qv_(qkv, torch.randn(1, 5, 8), *halves)
    assert torch.equal(qkv.detach(), before)


def test_cpp_is_not_replaced_in_silence():
    halves = [torch.randn(3, 8), torch.randn(8, 3)] * 2
    with pytest.raises(BackendError, match="x has 2 axes, it takes \\[B, T, C\\]"):
        ops.low_rank_qv_(torch.randn(5, 24), torch.randn(5, 8), *halves, backend="cpp")


@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=str)
def test_outputs_never_share_memory(wants):
    x, down, up, pre = torch.randn(2, 6, 8), torch.randn(4, 8), torch.randn(8, 4), torch.randn(2, 6, 4)
    torch.library.opcheck(
        torch.ops.cegate.low_rank_backward.default, (x, x, pre, down, up, True, True, 1, 0.5, [], *wants)
    )
    qkv, hidden, halves = torch.randn(2, 6, 24), torch.randn(2, 6, 8), (down, up, down, up)
    torch.library.opcheck(torch.ops.cegate.low_rank_qv_backward.default, (qkv, x, hidden, *halves, 0.5, [], *wants))
