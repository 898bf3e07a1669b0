import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.kernels._support import HAS_TRITON, is_interpreted
from cegate.kernels.frequency_adapter import frequency_adapter, frequency_adapter_fft

NAMES = ("down", "down_bias", "up", "up_bias", "router", "router_bias", "scale")


def random_layer(grid, channels, d, *, batch=2, dtype=torch.float64, device="cpu"):
    """x and the seven weights, scaled so that every activation is of order one."""
    shapes = [(batch, grid[0] * grid[1], channels)]
    shapes += [(3, d, channels), (3, d), (3, channels, d), (3, channels), (3, channels), (3,), ()]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    for place, fan in ((1, channels), (3, d), (5, channels)):
        tensors[place] /= fan**0.5
    return [tensor.to(device, dtype) for tensor in tensors]


def layer(grid, function=frequency_adapter, **options):
    return lambda x, *weights: function(x, grid, *weights, **options)


@pytest.mark.parametrize("band", ["official", "symmetric"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 6), (3, 1)], ids=str)
def test_project_first_is_the_published_module(grid, band, outputs_and_gradients):
    tensors = random_layer(grid, 7, 3)
    ours = outputs_and_gradients(layer(grid, cutoff=0.9, band=band), tensors)
    published = outputs_and_gradients(layer(grid, frequency_adapter_fft, cutoff=0.9, band=band), tensors)
    for mine, theirs in zip(ours, published, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_it_reproduces_the_published_layer(shared):
    vectors = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(
        shared / "vectors" / "earth_adapter_layer.npz").items()}  # fmt: skip
    x = vectors["x"].clone().requires_grad_()
    weights = [vectors[name].clone().requires_grad_() for name in NAMES]
    y = torch.cat([x[:, :1], frequency_adapter(x[:, 1:], (32, 32), *weights, float(vectors["cutoff"]))], 1)
    (y * vectors["probe"]).sum().backward()
    torch.testing.assert_close(y, vectors["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, vectors["dx"], atol=1e-5, rtol=1e-5)
    for name, weight in zip(NAMES, weights, strict=True):
        # relative to the largest entry: a sum over 1,024 tokens leaves small entries with the rounding of large ones
        largest = vectors[f"d_{name}"].abs().max().item()
        torch.testing.assert_close(weight.grad, vectors[f"d_{name}"], atol=1e-5 * largest, rtol=0)


def test_gradients_of_the_reference():
    tensors = [tensor.requires_grad_() for tensor in random_layer((4, 5), 5, 2)]
    assert torch.autograd.gradcheck(layer((4, 5), cutoff=0.7), tensors)


def test_gradients_of_the_learnable_cutoff():
    cutoff = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    tensors = [tensor.requires_grad_() for tensor in random_layer((4, 3), 4, 2)]
    op = lambda cutoff, x, *weights: frequency_adapter(x, (4, 3), *weights, cutoff=cutoff)  # noqa: E731
    assert torch.autograd.gradcheck(op, [cutoff, *tensors])


@pytest.mark.parametrize("frozen", ["x", "weights", "router"])
def test_gradients_nobody_wants_are_not_needed(frozen, outputs_and_gradients):
    tensors = random_layer((3, 3), 4, 2)
    _, *expected = outputs_and_gradients(layer((3, 3), cutoff=0.9), tensors)
    places = {"x": [0], "weights": range(1, 8), "router": [5, 6]}[frozen]
    leaves = [tensor.clone().requires_grad_(place not in places) for place, tensor in enumerate(tensors)]
    y = layer((3, 3), cutoff=0.9)(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient)


def test_only_x_and_the_narrow_hidden_tensor_are_kept():
    tensors = [tensor.requires_grad_() for tensor in random_layer((8, 8), 64, 2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer((8, 8))(*tensors)
    token_sized = [tensor for tensor in kept if tensor.ndim == 3 and tensor.shape[:2] == (2, 64)]
    assert sorted(tensor.shape[-1] for tensor in token_sized) == [3 * 2 + 3, 64]


def test_autocast_computes_narrow_and_keeps_the_residual():
    x, *weights = (tensor.float() for tensor in random_layer((4, 4), 16, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = frequency_adapter(x, (4, 4), *weights)
    assert y.dtype == torch.float32
    exact = frequency_adapter(x, (4, 4), *weights)
    assert 0 < (y - exact).abs().max() < 0.05 * (exact - x).abs().max()


SIZES = [((4, 4), 20, 5, 0.9), ((5, 7), 33, 16, 0.7), ((3, 19), 70, 3, 0.9), ((2, 2), 16, 4, 0.3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("grid", "channels", "d", "cutoff"), SIZES, ids=str)
def test_the_kernels_are_as_accurate_as_torch(grid, channels, d, cutoff, dtype, device, assert_as_accurate):
    tensors = random_layer(grid, channels, d, dtype=dtype, device=device)
    ours, torchs = (layer(grid, cutoff=cutoff, backend=backend) for backend in ("triton", "torch"))
    assert_as_accurate(ours, torchs, tensors, exact=layer(grid, frequency_adapter_fft, cutoff=cutoff))


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 20)), channels=st.integers(1, 40), d=st.integers(1, 18),
    cutoff=st.floats(0, 1), band=st.sampled_from(["official", "symmetric"]),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_the_kernels_on_any_size(grid, channels, d, cutoff, band):
    if not HAS_TRITON or not is_interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    tensors = random_layer(grid, channels, d, batch=1, dtype=torch.float32)
    ours = layer(grid, cutoff=cutoff, band=band, backend="triton")(*tensors)
    exact = layer(grid, frequency_adapter_fft, cutoff=cutoff, band=band)(*(tensor.double() for tensor in tensors))
    torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=1e-5)


def test_the_kernels_learn_the_cutoff(device, assert_as_accurate):
    tensors = random_layer((4, 6), 9, 3, dtype=torch.float32, device=device)
    ours, torchs = (
        lambda cutoff, x, *weights, backend=b: frequency_adapter(x, (4, 6), *weights, cutoff=cutoff, backend=backend)
        for b in ("triton", "torch")
    )
    assert_as_accurate(ours, torchs, [torch.tensor(0.5, device=device), *tensors])


def test_the_kernels_read_strided_and_empty_input(device, outputs_and_gradients):
    tokens, *weights = random_layer((4, 5), 18, 4, dtype=torch.float32, device=device)
    for x in (torch.cat([tokens, tokens], 1)[:, 20:], tokens.mT.contiguous().mT, tokens[:0]):
        ours = layer((4, 5), cutoff=0.8, backend="triton")(x, *weights)
        torch.testing.assert_close(ours, layer((4, 5), cutoff=0.8, backend="torch")(x, *weights), atol=1e-5, rtol=1e-5)


def test_the_kernels_take_float32_tokens_with_narrow_products(device):
    x, *weights = random_layer((4, 4), 20, 4, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = (frequency_adapter(x, (4, 4), *weights, cutoff=0.9, backend=b) for b in ("triton", "torch"))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


def test_the_kernels_are_deterministic(device, outputs_and_gradients):
    tensors = random_layer((5, 5), 24, 4, dtype=torch.float32, device=device)
    first, second = (outputs_and_gradients(layer((5, 5), backend="triton"), tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_wrong_shapes_are_all_named():
    x, down, down_bias, *rest = random_layer((2, 2), 6, 2)
    with pytest.raises(ValueError, match=r"down has shape \(3, 2, 5\), expected \(3, 2, 6\).*down_bias"):
        frequency_adapter(x, (2, 2), down[..., :5], down_bias[:2], *rest)


def test_experts_that_are_too_wide_say_so(device):
    tensors = random_layer((2, 2), 4, 65, dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match="experts are 65 wide, at most 64 on 2 columns"):
        layer((2, 2), backend="triton")(*tensors)
