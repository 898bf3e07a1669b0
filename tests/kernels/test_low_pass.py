import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.kernels._support import HAS_TRITON, is_interpreted
from cegate.kernels.low_pass import low_pass, low_pass_fft

GRIDS = [(4, 4), (5, 7), (1, 6), (13, 2), (3, 17)]
BANDS = ["official", "symmetric"]
sides = st.integers(1, 24)


def random_tokens(grid, channels=3, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, grid[0] * grid[1], channels, dtype=torch.float64, generator=generator).to(dtype)


@given(st.tuples(sides, sides), st.floats(0, 1), st.sampled_from(BANDS))
@settings(max_examples=60, deadline=None)
def test_it_is_the_fft_box(grid, cutoff, band):
    x = random_tokens(grid)
    torch.testing.assert_close(low_pass(x, grid, cutoff, band), low_pass_fft(x, grid, cutoff, band), atol=1e-12, rtol=0)


@given(st.tuples(sides, sides), st.floats(0, 1), st.sampled_from(BANDS))
@settings(max_examples=30, deadline=None)
def test_it_is_self_adjoint(grid, cutoff, band):
    x = random_tokens(grid)
    y = x.flip(1).roll(1, dims=2)
    left, right = (low_pass(x, grid, cutoff, band) * y).sum(), (x * low_pass(y, grid, cutoff, band)).sum()
    torch.testing.assert_close(left, right, atol=1e-10, rtol=0)


@given(st.tuples(sides, sides), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_symmetric_band_is_a_projection(grid, cutoff):
    once = low_pass(random_tokens(grid), grid, cutoff, "symmetric")
    torch.testing.assert_close(low_pass(once, grid, cutoff, "symmetric"), once, atol=1e-12, rtol=0)


def test_an_empty_band_gives_zeros():
    assert not low_pass(random_tokens((4, 4)), (4, 4), 0.3).any()


def test_it_reproduces_the_published_filter(shared):
    vectors = np.load(shared / "vectors" / "earth_adapter_layer.npz")
    x = torch.from_numpy(vectors["x"])[:, 1:, :64]
    low = low_pass(x, (32, 32), float(vectors["cutoff"]))
    torch.testing.assert_close(low.mT.unflatten(2, (32, 32)), torch.from_numpy(vectors["low"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=str)
def test_gradients_of_the_reference(grid, band):
    x = random_tokens(grid).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_pass(x, grid, 0.8, band, backend="torch"), x)


def test_gradients_of_the_learnable_cutoff():
    x, cutoff = random_tokens((5, 4)).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, cutoff: low_pass(x, (5, 4), cutoff), (x, cutoff))


def test_a_sharp_learnable_edge_is_the_symmetric_box():
    x = random_tokens((9, 8))
    # c = 2.6 lies well between two frequencies
    smooth = low_pass(x, (9, 8), torch.tensor(0.65, dtype=torch.float64), tau=1e-3)
    torch.testing.assert_close(smooth, low_pass(x, (9, 8), 0.5, "symmetric"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_kernel_is_as_accurate_as_torch(grid, band, dtype, device, assert_as_accurate):
    x = random_tokens(grid, channels=19, dtype=dtype).to(device)
    assert_as_accurate(
        lambda x: low_pass(x, grid, 0.9, band, backend="triton"),
        lambda x: low_pass(x, grid, 0.9, band, backend="torch"),
        [x],
        exact=lambda x: low_pass_fft(x, grid, 0.9, band),
    )


@given(grid=st.tuples(sides, sides), cutoff=st.floats(0, 1), band=st.sampled_from(BANDS), channels=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_the_kernel_on_any_grid(grid, cutoff, band, channels):
    if not HAS_TRITON or not is_interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    x = random_tokens(grid, channels, dtype=torch.float32)
    ours = low_pass(x, grid, cutoff, band, backend="triton")
    torch.testing.assert_close(ours.double(), low_pass_fft(x.double(), grid, cutoff, band), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(128, 3), (3, 127)], ids=str)
def test_the_kernel_at_the_largest_side(grid, device, assert_as_accurate):
    x = random_tokens(grid, batch=1, dtype=torch.float32).to(device)
    ours, torchs = (lambda x, backend=b: low_pass(x, grid, 1.0, backend=backend) for b in ("triton", "torch"))
    assert_as_accurate(ours, torchs, [x])


def test_the_kernel_learns_the_cutoff(device, assert_as_accurate):
    x, cutoff = random_tokens((6, 5), dtype=torch.float32).to(device), torch.tensor(0.5, device=device)
    ours, torchs = (lambda x, c, backend=b: low_pass(x, (6, 5), c, backend=backend) for b in ("triton", "torch"))
    assert_as_accurate(ours, torchs, [x, cutoff])


def test_the_kernel_reads_strided_and_empty_input(device):
    tokens = random_tokens((4, 5), channels=6, dtype=torch.float32).to(device)
    for x in (torch.cat([tokens, tokens], 1)[:, 20:], tokens.mT.contiguous().mT, tokens[:, :, ::2], tokens[:0]):
        ours = low_pass(x, (4, 5), 0.8, backend="triton")
        torch.testing.assert_close(ours, low_pass(x, (4, 5), 0.8, backend="torch"))


def test_the_kernel_is_deterministic(device):
    x = random_tokens((7, 6), dtype=torch.float32).to(device)
    first, second = (low_pass(x, (7, 6), 0.7, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "grid"), [("torch", (31, 9)), ("triton", (9, 31))])
def test_autocast_rounds_nothing_and_leaves_nothing_behind(backend, grid, device):
    x = random_tokens(grid, dtype=torch.float32).to(device)
    exact = low_pass_fft(x.double(), grid, 0.9)
    with torch.autocast(device.type, torch.bfloat16):  # no other test has filtered on this grid
        under = low_pass(x, grid, 0.9, backend=backend)
    for y in (under, low_pass(x, grid, 0.9, backend=backend)):
        torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=0)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"\[B, 12, C\].*cutoff=2.*band='round'"):
        low_pass(torch.zeros(1, 11, 2), (3, 4), 2, "round")


def test_a_grid_that_is_too_large_falls_back_or_says_so(device):
    x = torch.zeros(1, 129, 1, device=device)
    assert low_pass(x, (129, 1)).shape == x.shape
    with pytest.raises(RuntimeError, match="129 x 1 is larger than 128 x 128"):
        low_pass(x, (129, 1), backend="triton")
