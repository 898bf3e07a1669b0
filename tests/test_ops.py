"""The operators' one door: choice of a backend, and the C++ operators against PyTorch in float64."""

from __future__ import annotations

import contextlib
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate import native, ops
from cegate.errors import BackendError
from cegate.kernels._support import HAS_TRITON, is_interpreted

needs_cpp = pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)
DTYPES = [torch.float32, torch.bfloat16]


def frequency_weights(channels: int, width: int, stack: tuple[int, ...] = ()) -> list[torch.Tensor]:
    shapes = [(3, width, channels), (3, width), (3, channels, width), (3, channels), (3, channels), (3,), ()]
    return [torch.randn(*stack, *shape) * 0.3 if stack or shape else torch.tensor(0.7) for shape in shapes]


def results(function, tensors, dtype, **options) -> list[torch.Tensor]:
    """Output and every gradient, computed in dtype."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    y = function(*leaves, **options)
    weight = torch.linspace(0, 9, y.numel(), dtype=torch.float64).cos().view(y.shape).to(dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def assert_as_accurate(function, make, dtype) -> None:
    """Over several draws, C++ makes at most twice the error of PyTorch in the same dtype, judged in float64."""
    plain_errors, our_errors, sizes = [], [], []
    for _ in range(16):  # a bfloat16 value near zero may fall on either side of a ReLU, in either implementation
        tensors = [tensor.to(dtype) for tensor in make()]
        exact = results(function, tensors, torch.float64, backend="torch")
        plain = results(function, tensors, dtype, backend="torch")
        ours = results(function, tensors, dtype, backend="cpp")
        assert [(y.dtype, y.shape) for y in ours] == [(y.dtype, y.shape) for y in plain]
        for errors, found in ((plain_errors, plain), (our_errors, ours)):
            errors.append([(y.double() - truth).square().sum() for y, truth in zip(found, exact, strict=True)])
        sizes.append([truth.square().sum() for truth in exact])
    plain_total, our_total, size = (torch.tensor(rows).sum(0).sqrt() for rows in (plain_errors, our_errors, sizes))
    too_large = our_total > 2 * plain_total + torch.finfo(dtype).eps * size
    assert not too_large.any(), f"results {too_large.nonzero().flatten().tolist()}: {our_total} against {plain_total}"


GRIDS = [((4, 4), 0.3, "official"), ((7, 5), 0.9, "symmetric"), ((3, 11), 1.0, "official"), ((14, 14), 0.3, "official")]


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "cutoff", "band"), GRIDS, ids=str)
def test_cpp_low_pass_is_as_accurate_as_torch(grid, cutoff, band, dtype):
    def function(x, backend):
        return ops.low_pass(x, grid, cutoff, band, backend=backend)

    assert_as_accurate(function, lambda: [torch.randn(2, grid[0] * grid[1], 70)], dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "cutoff", "band"), GRIDS, ids=str)
@pytest.mark.parametrize(("channels", "width"), [(19, 5), (48, 32)])
def test_cpp_frequency_adapter_is_as_accurate_as_torch(grid, cutoff, band, channels, width, dtype):
    def make():
        return [torch.randn(2, grid[0] * grid[1], channels), *frequency_weights(channels, width)]

    def function(x, *weights, backend):
        return ops.frequency_adapter(x, grid, *weights, cutoff, band, backend=backend)

    assert_as_accurate(function, make, dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("parts", ["", "base", "biases", "base biases"])
def test_cpp_low_rank_is_as_accurate_as_torch(activation, parts, dtype):
    names = [name for name in ("base", "down_bias", "up_bias") if name.split("_")[-1] in parts]
    shapes = {"base": (2, 33, 21), "down_bias": (9,), "up_bias": (21,)}

    def make():  # whole numbers in front of a ReLU: in bfloat16 a value near zero could fall on either side of it
        weights = [torch.randint(-2, 3, (2, 33, 40)), torch.randint(-1, 2, (9, 40)) * 0.5, torch.randn(21, 9)]
        return weights + [torch.randint(-4, 5, shapes[name]) * 0.5 for name in names]

    def function(x, down, up, *more, backend):
        rest = dict(zip(names, more, strict=True))
        return ops.low_rank(x, down, up, **rest, activation=activation, scale=0.3, backend=backend)

    assert_as_accurate(function, make, dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_low_rank_qv_is_as_accurate_as_torch(dtype):
    def make():
        weights = [torch.randn(shape) * 0.3 for shape in ((7, 40), (24, 7)) * 2]
        return [torch.randn(2, 17, 72), torch.randn(2, 17, 40), *weights]

    def function(qkv, x, *weights, backend):
        return ops.low_rank_qv_(qkv * 1, x, *weights, 0.4, backend=backend)

    assert_as_accurate(function, make, dtype)


@needs_cpp
def test_low_rank_qv_changes_qkv_in_place():
    qkv, x = torch.randn(1, 5, 24), torch.randn(1, 5, 6)
    key = qkv[..., 8:16].clone()
    changed = ops.low_rank_qv_(qkv, x, torch.randn(2, 6), torch.randn(8, 2), torch.randn(2, 6), torch.randn(8, 2))
    assert changed.data_ptr() == qkv.data_ptr()
    assert torch.equal(qkv[..., 8:16], key)


@needs_cpp
def test_only_wanted_gradients_are_computed():
    x, (down, up) = torch.randn(2, 9, 12), (torch.randn(3, 12), torch.randn(12, 3, requires_grad=True))
    ops.low_rank(x, down, up, activation="gelu", backend="cpp").sum().backward()
    assert up.grad is not None
    assert x.grad is None
    assert down.grad is None


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values at every other address."""
    wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


@needs_cpp
def test_strides_do_not_matter():
    grid, x, weights = (4, 5), torch.randn(3, 20, 16), frequency_weights(16, 6)
    plain = ops.frequency_adapter(x, grid, *weights, backend="cpp")
    assert torch.equal(ops.frequency_adapter(strided(x), grid, *map(strided, weights), backend="cpp"), plain)
    down, up, qkv = torch.randn(4, 16), torch.randn(16, 4), torch.randn(3, 20, 48)
    value = qkv[..., 32:]
    expected = value + ops.low_rank(x, down, up, backend="torch")
    found = ops.low_rank(x.mT.contiguous().mT, strided(down), up, base=value, backend="cpp")
    torch.testing.assert_close(found, expected)


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8), (2, 6, 0)], ids=str)
def test_empty_tensors_pass(shape):
    grid = (2, 3) if shape[1] else (0, 3)
    x = torch.randn(shape, requires_grad=True)
    down, up = torch.randn(4, shape[2], requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = ops.low_rank(x, down, up, activation="relu", backend="cpp")
    assert y.shape == (*shape[:2], 5)
    y.sum().backward()
    assert torch.equal(down.grad, torch.zeros_like(down))
    if shape[1]:
        assert ops.frequency_adapter(x, grid, *frequency_weights(shape[2], 3), backend="cpp").shape == shape


@pytest.mark.parametrize("cutoff", [0.9, None], ids=["fixed", "learned"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp), "triton"])
def test_prefix_tokens_pass_the_frequency_adapter(backend, cutoff, device):
    if backend == "triton" and not (HAS_TRITON and is_interpreted()):
        pytest.skip("triton cannot run here")
    if backend == "cpp" and cutoff is None:
        pytest.skip("a learnable cutoff has no C++ form")
    x, *weights = grad_tensors(torch.randn(3, 2 + 12, 8), *frequency_weights(8, 5))
    wanted = [x, *weights]
    if cutoff is None:
        cutoff = torch.tensor(0.5, requires_grad=True)
        wanted.append(cutoff)
    rest = {"cutoff": cutoff, "backend": backend}
    whole = ops.frequency_adapter(x, (3, 4), *weights, prefix=2, **rest)
    apart = torch.cat([x[:, :2], ops.frequency_adapter(x[:, 2:], (3, 4), *weights, **rest)], 1)
    check_together(whole, apart, wanted)
    assert torch.equal(whole[:, :2], x[:, :2])


def test_prefix_tokens_pass_samples_with_own_adapters():
    x, weights = torch.randn(3, 2 + 12, 8), frequency_weights(8, 5)
    mixed = ops.frequency_adapter(x, (3, 4), *(w[None] for w in weights), 0.9, prefix=2, adapters=[0, -1, 0])
    alone = ops.frequency_adapter(x[:1], (3, 4), *weights, 0.9, prefix=2)
    torch.testing.assert_close(mixed[:2], torch.cat([alone, x[1:2]]))


def test_a_prefix_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"\(1, 12, 8\), a 3 x 4 grid behind 1 tokens needs \[B, 13, C\]"):
        ops.frequency_adapter(torch.randn(1, 12, 8), (3, 4), *frequency_weights(8, 5), prefix=1)
    with pytest.raises(ValueError, match="prefix=-1 is negative"):
        ops.frequency_adapter(torch.randn(1, 12, 8), (3, 4), *frequency_weights(8, 5), prefix=-1)


def squared_errors(found, exact) -> torch.Tensor:
    return torch.stack([(y.double() - truth).square().sum() for y, truth in zip(found, exact, strict=True)])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gelu", "relu", None, "frequency"])
def test_cpp_factors_of_scoring_are_as_accurate_as_torch(kind, dtype):
    ours = plain = size = 0
    for _ in range(8):
        if kind == "frequency":
            shared = [torch.randn(3, 35, 19), torch.randn(3, 35, 19), *frequency_weights(19, 6)]
            run = partial(_with_grid, grid=(5, 7), cutoff=0.7, band="symmetric")
        else:
            shapes = (3, 35, 19), (3, 35, 11), (6, 19), (11, 6), (6,)
            shared = [torch.randn(shape) for shape in shapes]
            run = partial(_low_rank_factors, activation=kind, scale=0.3)
        shared = [tensor.to(dtype) for tensor in shared]
        exact = run([tensor.double() for tensor in shared])  # the extension takes no float64
        with patch.object(native, "EXTENSION", None):
            reference = run(shared)
        found = run(shared)
        assert [(y.dtype, y.shape) for y in found] == [(y.dtype, y.shape) for y in reference]
        ours, plain = ours + squared_errors(found, exact), plain + squared_errors(reference, exact)
        size = size + torch.stack([truth.square().sum() for truth in exact])
    assert (ours.sqrt() <= 2 * plain.sqrt() + torch.finfo(dtype).eps * size.sqrt()).all(), (ours, plain)


def _low_rank_factors(tensors, **options) -> list[torch.Tensor]:
    *rest, bias = tensors
    return list(ops.low_rank_factors(*rest, down_bias=bias, **options))


def _with_grid(tensors, grid, **options) -> list[torch.Tensor]:
    x, dy, *weights = tensors
    return list(ops.frequency_adapter_factors(x, dy, grid, *weights, **options)[:-1])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize("adapters", [None, [1, -1, 0, 1]], ids=str)
def test_a_call_without_gradients_gives_the_same_bits(adapters, activation, dtype):
    stack = (2,) if adapters else ()
    x, base, qkv = (torch.randn(4, 37, width, dtype=dtype) for width in (24, 24, 72))
    down, up = torch.randn(*stack, 5, 24, dtype=dtype), torch.randn(*stack, 24, 5, dtype=dtype)
    bias = torch.randn(*stack, 24, dtype=dtype)
    rest = {"adapters": adapters, "backend": "cpp"}

    def both() -> list[torch.Tensor]:
        y = ops.low_rank(x, down, up, base=base, up_bias=bias, activation=activation, scale=0.3, **rest)
        return [y, ops.low_rank_qv_(qkv.clone(), x, down, up, down, up, 0.3, **rest)]

    down.requires_grad_()
    kept = both()
    assert all(y.requires_grad for y in kept)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(kept, both(), strict=True))


@needs_cpp
def test_tokens_that_share_memory_with_qkv_are_read_before_they_change():
    down, up = torch.randn(3, 24), torch.randn(8, 3)
    memory = torch.randn(700, 24)
    for qkv, x in ((memory[:600], memory[:600]), (memory[:600], memory[100:]), (memory[100:], memory[:600])):
        before = memory.clone()
        qkv, x = qkv.view(2, 300, 24), x.view(2, 300, 24)
        expected = ops.low_rank_qv_(qkv.clone(), x.clone(), down, up, down, up, 0.1, backend="torch")
        with torch.no_grad():
            found = ops.low_rank_qv_(qkv, x, down, up, down, up, 0.1, backend="cpp")
        torch.testing.assert_close(found, expected)
        memory.copy_(before)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(2, 0), (0, 2)], ids=str)
def test_a_grid_without_tokens_passes_through_every_frequency_operator(grid, dtype):
    x = torch.zeros(2, 0, 8, dtype=dtype)
    weights = [weight.to(dtype) for weight in frequency_weights(8, 3)]
    down, _, up, up_bias, router, _, scale = weights
    filters = torch.randn(2, grid[0]), torch.randn(2, grid[1]), torch.ones(2), torch.ones(2), False
    cegate = torch.ops.cegate
    y, active = cegate.frequency_adapter(x, *weights, *filters, [])
    assert y.shape == x.shape
    rest = (down, up, up_bias, router, scale, *filters, [], True, True)
    dx, *gradients = cegate.frequency_adapter_backward(x, x, active, *rest)
    assert dx.shape == x.shape and all(not gradient.any() for gradient in gradients)
    found = cegate.frequency_adapter_factors(x, x, *weights, *filters)
    assert found[0].shape == x.shape and not found[-1].any()


def grad_tensors(*tensors: torch.Tensor, place: torch.device | str = "cpu") -> list[torch.Tensor]:
    return [tensor.to(place).requires_grad_() for tensor in tensors]


def frozen(tensors) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors]


@needs_cpp
def test_opcheck_passes_for_the_operators_of_cpp():
    grid = (3, 4, 0.9, "official")
    x, *weights = grad_tensors(torch.randn(2, 12, 8), *frequency_weights(8, 5))
    cegate, check = torch.ops.cegate, torch.library.opcheck
    check(cegate.low_pass_on_grid.default, (x, *grid))
    check(cegate.frequency_adapter_on_grid.default, (x, *weights, *grid, []))
    low = grad_tensors(torch.randn(4, 8), torch.randn(6, 4))
    base, down_bias, up_bias = grad_tensors(torch.randn(2, 12, 6), torch.randn(4), torch.randn(6))
    check(cegate.low_rank.default, (x, *low, base, down_bias, up_bias, 2, 0.5, []))
    check(cegate.low_rank.default, (x, *low, None, None, None, 0, 1.0, []))
    qkv = torch.randn(2, 12, 18)
    check(cegate.low_rank_qv.default, (qkv.requires_grad_(), x, *low, *low, 0.5, []))
    plain, qkv = frozen((x, *low)), qkv.detach()
    pre, dy = torch.randn(2, 12, 4), torch.randn(2, 12, 6)
    check(cegate.low_rank_backward.default, (dy, plain[0], pre, *plain[1:], True, True, 1, 0.5, [], True, True))
    halves, hidden = (*plain[1:], *plain[1:]), torch.randn(2, 12, 8)
    check(cegate.low_rank_qv_backward.default, (qkv, plain[0], hidden, *halves, 0.5, [0, 0], True, True))
    check(cegate.low_rank_factors.default, (plain[0], dy, *plain[1:], torch.randn(4), 2, 0.5))
    down, _, up, up_bias, router, _, scale = weights = frozen(weights)
    check(cegate.frequency_adapter_factors_on_grid.default, (plain[0], plain[0], *weights, *grid))
    saved = (plain[0], plain[0], torch.rand(2, 12, 18), down, up, up_bias, router, scale)
    check(cegate.frequency_adapter_on_grid_backward.default, (*saved, *grid, [], True, True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_passes_for_the_operators_of_kernels(backend, device):
    if backend == "triton" and not (HAS_TRITON and (device.type == "cuda" or is_interpreted())):
        pytest.skip("triton cannot run here")
    cegate, single = torch.ops.cegate, torch.float32
    # gradients and symbolic sizes are the same functions for both
    tests = {} if backend == "torch" else {"test_utils": ("test_schema", "test_faketensor")}
    check = partial(torch.library.opcheck, **tests)
    x, *weights = grad_tensors(torch.randn(2, 13, 8), *frequency_weights(8, 5), place=device)
    learned = torch.tensor(0.5, device=device, requires_grad=True)
    for cutoff in (None, learned):
        edge = (3, 4, 0.9, cutoff, "official", 0.5)
        patches = x.detach()[:, 1:].requires_grad_()  # with the strides of a part
        check(cegate.fused_low_pass.default, (patches, *edge, backend))
        check(cegate.fused_frequency_adapter.default, (x, *weights, *edge, 1, single, backend))
        known = (*frozen((patches, patches, *weights)), *edge[:3], None if cutoff is None else learned.detach())
        check(cegate.fused_frequency_adapter_factors.default, (*known, *edge[4:]))
    low = grad_tensors(torch.randn(4, 8), torch.randn(6, 4), place=device)
    base, down_bias, up_bias = grad_tensors(torch.randn(2, 13, 6), torch.randn(4), torch.randn(6), place=device)
    for dtype in (single, torch.bfloat16):
        check(cegate.fused_low_rank.default, (x, *low, base, down_bias, up_bias, "gelu", 0.5, dtype, backend))
        check(cegate.fused_low_rank.default, (x, *low, None, None, None, None, 1.0, dtype, backend))
        qkv = torch.randn(2, 13, 18, device=device, requires_grad=True)
        check(cegate.fused_low_rank_qv.default, (qkv, x, *low, *low, 0.5, dtype, backend))
    check(cegate.fused_low_rank_factors.default, (*frozen((x, base, *low)), None, "relu", 0.5))
    check(cegate.fused_sum_squared_gradients.default, (*frozen((x, base)), False, backend))


BOTH = ["torch", pytest.param("cpp", marks=needs_cpp)]
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (torch.cuda.is_available() or is_interpreted()), reason="Triton has no GPU nor an interpreter"
)
ALL = [*BOTH, pytest.param("triton", marks=needs_triton)]


@pytest.fixture
def place(backend, device) -> torch.device:
    """Where a backend runs here: Triton on the GPU if there is one, else through its interpreter."""
    return device if backend == "triton" else torch.device("cpu")


# which samples use which adapter: sorted, mixed, with some off, all off
ASSIGNMENTS = [[0, 0, 1, 2], [2, 0, 2, 1], [-1, 1, -1, 1], [-1, -1, -1, -1]]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("adapters", ASSIGNMENTS, ids=str)
def test_frequency_samples_with_own_adapters_equal_each_sample_alone(adapters, backend, place):
    grid = (3, 4)
    x, *stacked = grad_tensors(torch.randn(4, 12, 8), *frequency_weights(8, 5, (3,)), place=place)
    together = ops.frequency_adapter(x, grid, *stacked, 0.9, adapters=adapters, backend=backend)
    apart = [
        x[b : b + 1]
        if a < 0
        else ops.frequency_adapter(x[b : b + 1], grid, *(w[a] for w in stacked), 0.9, backend="torch")
        for b, a in enumerate(adapters)
    ]
    check_together(together, torch.cat(apart), [x, *stacked])


def test_frequency_adapters_have_cutoffs_of_their_own():
    grid, adapters = (3, 4), [1, 0, -1]
    x, cutoffs, *stacked = grad_tensors(torch.randn(3, 12, 8), torch.tensor([0.2, 0.8]), *frequency_weights(8, 5, (2,)))
    together = ops.frequency_adapter(x, grid, *stacked, cutoffs, adapters=adapters)
    apart = [
        ops.frequency_adapter(x[b : b + 1], grid, *(w[a] for w in stacked), cutoffs[a])
        for b, a in enumerate(adapters[:2])
    ]
    check_together(together, torch.cat([*apart, x[2:]]), [x, cutoffs, *stacked])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("adapters", ASSIGNMENTS, ids=str)
def test_low_rank_samples_with_own_adapters_equal_each_sample_alone(adapters, backend, place):
    x, base, down, up, down_bias, up_bias = tensors = grad_tensors(
        torch.randn(4, 9, 8),
        torch.randn(4, 9, 6),
        torch.randn(3, 5, 8),
        torch.randn(3, 6, 5),
        torch.randn(3, 5),
        torch.randn(3, 6),
        place=place,
    )
    rest = {"activation": "gelu", "scale": 0.5}
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    together = ops.low_rank(x, down, up, base=base, **biases, **rest, adapters=adapters, backend=backend)
    apart = [
        base[b]
        if a < 0
        else ops.low_rank(
            x[b], down[a], up[a], base=base[b], down_bias=down_bias[a], up_bias=up_bias[a], **rest, backend="torch"
        )
        for b, a in enumerate(adapters)
    ]
    check_together(together, torch.stack(apart), tensors)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("adapters", ASSIGNMENTS, ids=str)
def test_qv_samples_with_own_adapters_equal_each_sample_alone(adapters, backend, place):
    qkv, x, *stacked = tensors = grad_tensors(
        torch.randn(4, 9, 18),
        torch.randn(4, 9, 8),
        *(torch.randn(3, *shape) for shape in ((5, 8), (6, 5)) * 2),
        place=place,
    )
    together = ops.low_rank_qv_(qkv * 1, x, *stacked, 0.5, adapters=adapters, backend=backend)
    apart = [
        qkv[b : b + 1]
        if a < 0
        else ops.low_rank_qv_(qkv[b : b + 1] * 1, x[b : b + 1], *(w[a] for w in stacked), 0.5, backend="torch")
        for b, a in enumerate(adapters)
    ]
    check_together(together, torch.cat(apart), tensors)


def check_together(together: torch.Tensor, apart: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    weight = torch.linspace(0, 7, apart.numel(), device=apart.device).cos().view(apart.shape)
    found, expected = (
        torch.autograd.grad((y * weight).sum(), tensors, allow_unused=True, materialize_grads=True)
        for y in (together, apart)
    )
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BOTH)
def test_a_wrong_adapter_index_is_named(backend):
    x, down, up = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 4, 5)
    with pytest.raises((ValueError, RuntimeError), match=r"adapters\[1\] is 2, accepted are -1 \(off\) to 1"):
        ops.low_rank(x, down, up, adapters=[0, 2], backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="adapters has 1 entries for 2 samples"):
        ops.low_rank(x, down, up, adapters=[0], backend=backend)


@pytest.mark.parametrize("backend", BOTH)
def test_an_empty_batch_passes_weights_of_several_adapters(backend):
    x = torch.randn(0, 6, 8)
    down, up = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 8, 4)
    y = ops.low_rank(x, down, up, adapters=[], backend=backend)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(down.grad, torch.zeros_like(down))
    qkv = torch.randn(0, 6, 24)
    assert ops.low_rank_qv_(qkv, x, down, up, down, up, adapters=[], backend=backend).shape == qkv.shape
    weights = frequency_weights(8, 3, (2,))
    assert ops.frequency_adapter(x, (2, 3), *weights, adapters=[], backend=backend).shape == x.shape


SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4)
ANY_DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float16])


@st.composite
def any_tensor(draw, likely: tuple[int, ...]):
    shape = draw(st.one_of(st.just(list(likely)), SHAPES))
    tensor = torch.ones(shape, dtype=draw(st.one_of(st.just(torch.float32), ANY_DTYPE)))
    if draw(st.booleans()) and tensor.ndim > 1:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.to_sparse() if draw(st.integers(0, 20)) == 0 else tensor


LISTS = st.lists(st.integers(-3, 3), max_size=4)


@needs_cpp
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_arguments_raise_or_compute_but_never_crash(data):
    d, c, tokens = 3, 4, 6
    take = lambda *shape: data.draw(any_tensor(shape))  # noqa: E731
    x = take(2, tokens, c)
    filters = take(3, 2), take(3, 3), take(3), take(3), data.draw(st.booleans())
    weights = take(3, d, c), take(3, d), take(3, c, d), take(3, c), take(3, c), take(3), take()
    adapters, number = data.draw(LISTS), data.draw(st.integers(-2, 4))
    halves = take(d, c), take(c, d), take(d, c), take(c, d)
    flags = [data.draw(st.booleans()) for _ in range(2)]
    qkv, hidden = take(2, tokens, 3 * c), take(2, tokens, 2 * d)
    cegate = torch.ops.cegate
    down, _, up, up_bias, router, _, scale = weights
    saved = take(2, tokens, c), x, take(2, tokens, 3 * d + 3)
    calls = {
        "low_pass": lambda: cegate.low_pass(x, *filters),
        "frequency_adapter": lambda: cegate.frequency_adapter(x, *weights, *filters, adapters),
        "frequency_adapter_backward": lambda: cegate.frequency_adapter_backward(
            *saved, down, up, up_bias, router, scale, *filters, adapters, *flags
        ),
        "low_rank": lambda: cegate.low_rank(
            x, *halves[:2], take(2, tokens, c), take(d), take(c), number, 0.5, adapters
        ),
        "low_rank_backward": lambda: cegate.low_rank_backward(
            take(2, tokens, c), x, take(2, tokens, d), *halves[:2], *flags, number, 0.5, adapters, *flags
        ),
        "low_rank_factors": lambda: cegate.low_rank_factors(x, saved[0], *halves[:2], take(d), number, 0.5),
        "frequency_adapter_factors": lambda: cegate.frequency_adapter_factors(x, saved[0], *weights, *filters),
        "low_rank_qv_": lambda: cegate.low_rank_qv_(qkv, x, *halves, 0.5, adapters),
        "low_rank_qv_backward": lambda: cegate.low_rank_qv_backward(qkv, x, hidden, *halves, 0.5, adapters, *flags),
    }
    name = data.draw(st.sampled_from(sorted(calls)))
    with contextlib.suppress(RuntimeError, NotImplementedError):
        calls[name]()


@needs_cpp
def test_a_wrong_shape_is_named_with_its_values():
    weights = frequency_weights(8, 5)
    weights[4] = torch.randn(3, 9)
    with pytest.raises(RuntimeError, match=r"frequency_adapter: router has shape \[3, 9\], expected \[3, 8\]"):
        ops.frequency_adapter(torch.randn(1, 12, 8), (3, 4), *weights, backend="cpp")


def test_cpp_that_cannot_run_raises_with_every_reason():
    with pytest.raises(BackendError) as caught:
        ops.low_pass(torch.randn(1, 4, 2, dtype=torch.float64), (2, 2), torch.tensor(0.3), backend="cpp")
    message = str(caught.value)
    assert message.startswith("low_pass: backend='cpp' cannot run: a learnable cutoff has no C++ form; ")
    assert "x is float64" in message or native.REASON in message
    assert message.endswith("use backend='auto'")


def test_triton_that_cannot_run_raises_a_backend_error():
    with pytest.raises(BackendError, match="x is float64"):
        ops.low_pass(torch.randn(1, 4, 2, dtype=torch.float64), (2, 2), backend="triton")


def test_no_cpp_form_is_said():
    with pytest.raises(BackendError, match="no C\\+\\+ form"):
        ops.sum_squared_gradients(torch.randn(1, 2, 3), torch.randn(1, 2, 3), backend="cpp")


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='cuda' is unknown; use one of auto, torch, triton, cpp"):
        ops.low_pass(torch.randn(1, 4, 2), (2, 2), backend="cuda")


def test_auto_falls_back_quietly():
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    plain = ops.low_pass(x, (3, 4), 0.9, backend="torch")
    assert torch.equal(ops.low_pass(x, (3, 4), 0.9), plain)


@needs_cpp
def test_auto_takes_cpp_on_the_cpu(monkeypatch):
    x, calls = torch.randn(1, 12, 8), []
    monkeypatch.setattr(ops, "_low_pass", lambda *args, **options: calls.append(args))
    ops.low_pass(x, (3, 4), 0.9)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        ops.low_pass(x, (3, 4), 0.9)
    assert len(calls) == 1


def test_backends_says_for_each_what_is_loaded_or_why_not():
    report = ops.backends()
    assert list(report) == ["torch", "triton", "cpp"]
    assert torch.__version__ in report["torch"]
    assert all(state.split(":")[0] in ("loaded", "idle", "not loaded") for state in report.values())
    if native.EXTENSION is not None:
        assert "loops for" in report["cpp"]
