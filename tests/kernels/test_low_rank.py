import pytest
import torch
from torch.nn.functional import gelu, linear, relu

from cegate.kernels.low_rank import low_rank, low_rank_qv_

ACTIVATIONS = {None: lambda pre: pre, "relu": relu, "gelu": gelu}


def random_maps(tokens, channels, rank, out, *, dtype=torch.float64, device="cpu"):
    """x, down, up, a fused qkv output to take the base from, and the two biases."""
    shapes = [(*tokens, channels), (rank, channels), (out, rank), (*tokens, 3 * out), (rank,), (out,)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    tensors[1] /= channels**0.5
    tensors[2] /= rank**0.5
    return [tensor.to(device, dtype) for tensor in tensors]


def adapter(activation, **options):
    def op(x, down, up, qkv, down_bias, up_bias):
        base = qkv[..., up.shape[0] : 2 * up.shape[0]]
        biases = {"down_bias": down_bias, "up_bias": up_bias}
        return low_rank(x, down, up, base=base, **biases, activation=activation, scale=0.3, **options)

    return op


def plain_adapter(activation):
    def op(x, down, up, qkv, down_bias, up_bias):
        hidden = ACTIVATIONS[activation](linear(x, down, down_bias))
        return qkv[..., up.shape[0] : 2 * up.shape[0]] + 0.3 * linear(hidden, up, up_bias)

    return op


def lora_qv(**options):
    return lambda qkv, *maps: low_rank_qv_(qkv.clone(), *maps, 0.5, **options)


def plain_lora_qv(qkv, x, down_q, up_q, down_v, up_v):
    q, k, v = qkv.chunk(3, -1)
    return torch.cat([q + 0.5 * linear(linear(x, down_q), up_q), k, v + 0.5 * linear(linear(x, down_v), up_v)], -1)


def random_lora(tokens, channels, rank, out, **options):
    x, down, up, qkv, *_ = random_maps(tokens, channels, rank, out, **options)
    return [qkv, x, down, up, down.flip(0), up.flip(0)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_it_is_the_plain_formula(activation, outputs_and_gradients):
    tensors = random_maps((2, 3), 5, 2, 4)
    ours, plain = (outputs_and_gradients(op(activation), tensors) for op in (adapter, plain_adapter))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_base_and_biases_it_is_two_products():
    x, down, up, *_ = random_maps((7,), 5, 2, 4)
    torch.testing.assert_close(low_rank(x, down, up, scale=2.0), 2 * x @ down.T @ up.T)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_of_the_reference(activation):
    tensors = [tensor.requires_grad_() for tensor in random_maps((2, 3), 4, 2, 3)]
    assert torch.autograd.gradcheck(adapter(activation, backend="torch"), tensors)


def test_lora_on_q_and_v_is_the_plain_formula(outputs_and_gradients):
    tensors = random_lora((2, 3), 5, 2, 4)
    ours, plain = outputs_and_gradients(lora_qv(), tensors), outputs_and_gradients(plain_lora_qv, tensors)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lora_qv(), [tensor.requires_grad_() for tensor in tensors])


def test_lora_changes_qkv_in_place_and_hands_its_gradient_through_uncopied():
    qkv, *maps = random_lora((2, 3), 5, 2, 4)
    qkv = qkv.requires_grad_() * 1
    y = low_rank_qv_(qkv, *(tensor.requires_grad_() for tensor in maps))
    assert y.data_ptr() == qkv.data_ptr()
    assert torch.equal(y, qkv)
    assert y.grad_fn.name() == "_LowRankQVBackward"
    seen = {}
    y.grad_fn.register_hook(lambda inputs, outputs: seen.update(given=outputs[0], passed=inputs[0]))
    y.sum().backward()
    assert seen["given"].data_ptr() == seen["passed"].data_ptr()


SIZES = [((2, 9), 20, 5, 33), ((1, 70), 65, 64, 17), ((2, 5), 16, 130, 16), ((1,), 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels_are_as_accurate_as_torch(size, activation, dtype, device, assert_as_accurate):
    ours, torchs = (adapter(activation, backend=backend) for backend in ("triton", "torch"))
    assert_as_accurate(ours, torchs, random_maps(*size, dtype=dtype, device=device), exact=plain_adapter(activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [((2, 9), 20, 5, 33), ((1, 70), 65, 64, 16)], ids=str)
def test_the_lora_kernels_are_as_accurate_as_torch(size, dtype, device, assert_as_accurate):
    ours, torchs = (lora_qv(backend=backend) for backend in ("triton", "torch"))
    assert_as_accurate(ours, torchs, random_lora(*size, dtype=dtype, device=device), exact=plain_lora_qv)


def test_the_kernels_read_strided_and_empty_input(device):
    x, down, up, *_ = random_maps((2, 6), 18, 4, 5, dtype=torch.float32, device=device)
    for view in (x[:, 1:], x.mT.contiguous().mT, x[:0]):
        ours, torchs = (low_rank(view, down, up, backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(ours, torchs)


def test_the_kernels_are_deterministic(device, outputs_and_gradients):
    tensors = random_maps((2, 40), 24, 8, 20, dtype=torch.float32, device=device)
    first, second = (outputs_and_gradients(adapter("gelu", backend="triton"), tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_autocast_computes_narrow_and_keeps_the_dtype_of_the_base():
    x, down, up, qkv, *_ = random_maps((2, 3), 8, 2, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank(x, down, up, base=qkv[..., :4])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, qkv[..., :4] + linear(linear(x, down), up), atol=0.1, rtol=0.02)


def test_all_problems_are_named_at_once():
    x, down, up, *_ = random_maps((2, 3), 5, 2, 4)
    with pytest.raises(ValueError, match=r"base has shape \(2, 3, 3\), expected \(2, 3, 4\).*activation='tanh'"):
        low_rank(x, down, up, base=torch.zeros(2, 3, 3), activation="tanh")
    with pytest.raises(ValueError, match="must be contiguous"):
        low_rank_qv_(torch.zeros(2, 3, 24)[..., ::2], x, down, up, down, up)


def test_a_rank_that_is_too_large_says_so(device):
    x, down, up, *_ = random_maps((2,), 3, 257, 3, dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match="rank 257 is above 256"):
        low_rank(x, down, up, backend="triton")
