import pytest
import torch

from cegate.kernels import _support
from cegate.kernels._support import KernelUnavailableError, accumulation_dtype, compute_dtype, pad, pick_backend


def test_auto_takes_torch_on_the_cpu():
    assert pick_backend("op", "auto", x=torch.zeros(2)) == "torch"


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is unknown; use one of auto, torch, triton"):
        pick_backend("op", "cuda", x=torch.zeros(2))


def test_an_explicit_backend_that_cannot_run_gives_every_reason(monkeypatch):
    monkeypatch.setattr(_support, "HAS_TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError) as caught:
        pick_backend("op", "triton", limits=["rank 300 is above 256"], x=torch.zeros(2, dtype=torch.float64))
    for reason in ("rank 300", "triton is not installed", "x is float64", "x is on the CPU", "use backend='auto'"):
        assert reason in str(caught.value)


def test_autocast_decides_the_dtype_of_the_products():
    x = torch.zeros(2)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        assert compute_dtype(x.double()) == torch.float64


def test_sums_are_at_least_float32():
    assert accumulation_dtype(torch.bfloat16) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize(("size", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (99, 128), (128, 128)])
def test_blocks_are_padded_to_powers_of_two_from_16(size, padded):
    assert pad(size) == padded
