import pytest
import torch
import torch.nn.functional as F

from cegate.kernels.residual_norm import residual_norm

EPS = 1e-6
# a width below and above a power of two, several warps; tokens on two axes
SHAPES = [(3, 5, 48), (7, 1030)]


def make(shape, branch_dtype, parts, device):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    x, branch = 3 * draw(*shape) + 1, draw(*shape).to(branch_dtype)
    weights = [draw(shape[-1]) if name in parts else None for name in ("scale", "weight", "bias")]
    return x.requires_grad_(), branch.requires_grad_() if "branch" in parts else None, *weights


def run(op, tensors, dtype, half):
    """y, h and the gradients of x and branch under a probe of either; computed in ``dtype``."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype) for t in tensors]
    learning = [leaf.requires_grad_() for leaf in leaves[:2] if leaf is not None]
    with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=half):
        y, h = op(*leaves)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(y.shape, generator=generator).bfloat16().to(y.device) for _ in range(2)]
    wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, h))
    loss = sum((t * probe).sum() for t, probe in zip(wide, probes, strict=True))
    return y.detach(), h.detach(), *torch.autograd.grad(loss, learning)


def formula(x, branch, scale, weight, bias):
    """As a block of a transformer is written; autocast casts the norm where a product reads it."""
    if branch is not None:
        x = x + (branch if scale is None else branch * scale)
    h = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return x, h.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else h


PARTS = [("branch", "scale", "weight", "bias"), ("branch", "weight"), ("branch",), ("weight", "bias")]


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_sum_is_pytorchs_and_norm_and_gradients_err_no_more(parts, half, device):
    for shape in SHAPES:
        tensors = make(shape, torch.bfloat16 if half else torch.float32, parts, device)
        ours = run(lambda *t: residual_norm(*t, EPS, backend="triton"), tensors, None, half)
        theirs, exact = run(formula, tensors, None, half), run(formula, tensors, torch.float64, False)
        assert torch.equal(ours[0], theirs[0])
        for mine, other, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            error, allowed = ((t.double() - true).abs().max() for t in (mine, other))
            assert error <= 2 * allowed + torch.finfo(mine.dtype).eps * true.abs().max()


@pytest.mark.parametrize("read", ["y", "h"])
def test_what_nobody_reads_has_no_part_in_the_gradient(read, device):
    x, branch, *weights = make((4, 40), torch.float32, PARTS[0], device)
    probe = torch.randn(4, 40).to(device)
    found = []
    for op in (lambda *t: residual_norm(*t, EPS, backend="triton"), formula):
        y, h = op(x, branch, *weights)
        found.append(torch.autograd.grad(((y if read == "y" else h) * probe).sum(), (x, branch)))
    for mine, other in zip(*found, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_frozen_inputs_want_no_gradient_and_a_weight_that_learns_gets_one(device):
    x, branch, scale, weight, bias = make((4, 40), torch.float32, PARTS[0], device)
    _, h = residual_norm(x.detach(), branch, scale, weight, bias, EPS, backend="triton")
    (alone,) = torch.autograd.grad(h.square().sum(), branch)
    _, h = residual_norm(x, branch, scale, weight.requires_grad_(), bias, EPS)
    together = torch.autograd.grad(h.square().sum(), (branch, weight))
    torch.testing.assert_close(alone, together[0], rtol=1e-4, atol=1e-4)
    assert together[1].abs().max() > 0
    with pytest.raises(RuntimeError, match="weight learns"):
        residual_norm(x, branch, scale, weight, bias, EPS, backend="triton")


def test_weights_may_have_any_strides(device):
    x, branch, *weights = make((4, 40), torch.float32, PARTS[0], device)
    sparse = [torch.stack([w, torch.full_like(w, 9)], 1)[:, 0] for w in weights]
    found = [residual_norm(x, branch, *given, EPS, backend="triton") for given in (weights, sparse)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_second_derivatives_are_refused(device):
    x, branch, *weights = make((4, 40), torch.float32, PARTS[0], device)
    _, h = residual_norm(x, branch, *weights, EPS, backend="triton")
    with pytest.raises(NotImplementedError, match="residual_norm"):
        torch.autograd.grad(h.square().sum(), x, create_graph=True)
