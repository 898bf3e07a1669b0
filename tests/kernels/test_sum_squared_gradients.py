import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.kernels.sum_squared_gradients import sum_squared_bias_gradients, sum_squared_gradients


def random_pair(samples, tokens, width, out, *, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (samples, tokens, width), (samples, tokens, out)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]


def one_backward_per_sample(inputs, grads):
    """Squared weight and bias gradients of a real linear layer, a batch of one at a time."""
    layer = torch.nn.Linear(inputs.shape[2], grads.shape[2], dtype=inputs.dtype)
    weight, bias = 0, 0
    for a, g in zip(inputs, grads, strict=True):
        dweight, dbias = torch.autograd.grad((layer(a) * g).sum(), [layer.weight, layer.bias])
        weight, bias = weight + dweight**2, bias + dbias**2
    return weight, bias


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_it_is_one_backward_per_sample(samples, tokens, width, out):
    inputs, grads = random_pair(samples, tokens, width, out)
    weight, bias = one_backward_per_sample(inputs, grads)
    torch.testing.assert_close(sum_squared_gradients(inputs, grads), weight)
    torch.testing.assert_close(sum_squared_gradients(inputs, grads, reduce=True), weight.sum())
    torch.testing.assert_close(sum_squared_bias_gradients(grads), bias)
    torch.testing.assert_close(sum_squared_bias_gradients(grads, reduce=True), bias.sum())


def test_samples_are_squared_before_they_are_summed():
    inputs, grads = torch.ones(2, 1, 1), torch.tensor([[[3.0]], [[-3.0]]])
    assert sum_squared_gradients(inputs, grads).item() == 18


def test_sums_of_narrow_dtypes_do_not_stall():
    # 512 equal terms: a bfloat16 sum would stop at the 256th
    inputs = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    assert sum_squared_gradients(inputs, inputs).item() == 512**2
    assert sum_squared_bias_gradients(inputs).item() == 512**2


def test_no_samples_give_zeros():
    inputs, grads = random_pair(0, 3, 4, 5)
    assert torch.equal(sum_squared_gradients(inputs, grads), torch.zeros(5, 4, dtype=torch.float64))
    assert sum_squared_gradients(inputs, grads, reduce=True) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("size", [(3, 7, 20, 5), (1, 70, 33, 65), (5, 1, 3, 2)], ids=str)
def test_the_kernel_is_as_accurate_as_torch(size, reduce, dtype, device):
    inputs, grads = random_pair(*size, dtype=dtype, device=device)
    exact = sum_squared_gradients(inputs.double(), grads.double(), reduce=reduce)
    ours, torchs = (sum_squared_gradients(inputs, grads, reduce=reduce, backend=b) for b in ("triton", "torch"))
    assert ours.dtype == torchs.dtype == torch.float32
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + rounding


@pytest.mark.parametrize("reduce", [False, True])
def test_the_kernel_reads_strided_and_empty_input(reduce, device):
    inputs, grads = random_pair(3, 8, 10, 6, dtype=torch.float32, device=device)
    for a, g in ((inputs[:, 1:], grads[:, :7]), (inputs.mT.contiguous().mT, grads[..., ::2]), (inputs[:0], grads[:0])):
        ours, torchs = (sum_squared_gradients(a, g, reduce=reduce, backend=b) for b in ("triton", "torch"))
        torch.testing.assert_close(ours, torchs)


def test_the_kernel_is_deterministic(device):
    inputs, grads = random_pair(4, 9, 40, 33, dtype=torch.float32, device=device)
    for reduce in (False, True):
        first, second = (sum_squared_gradients(inputs, grads, reduce=reduce, backend="triton") for _ in range(2))
        assert torch.equal(first, second)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"inputs \(2, 3, 4\) and grads \(2, 2, 4\)"):
        sum_squared_gradients(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))
