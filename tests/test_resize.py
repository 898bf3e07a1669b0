"""Resizing by products against the library's bilinear interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cegate.resize import resize

SIZES = [
    ((4, 4), (32, 32)),
    ((5, 3), (11, 48)),
    ((7, 7), (4, 3)),
    ((1, 1), (8, 5)),
    ((6, 9), (6, 18)),
    ((6, 9), (3, 9)),
]


@pytest.mark.parametrize(("given", "size"), SIZES)
def test_values_and_gradients_are_those_of_the_library(given, size):
    x = torch.randn(2, 3, *given, dtype=torch.float64, requires_grad=True)
    ours, theirs = resize(x, size), F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    probe = torch.randn_like(theirs)
    mine, other = (torch.autograd.grad((y * probe).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-13 * float(other.abs().max()))


def test_a_map_of_the_size_is_itself_and_half_precision_is_rounded_once():
    x = torch.randn(2, 3, 4, 6)
    assert resize(x, (4, 6)) is x
    narrow = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, single = resize(narrow, (9, 9)), resize(x, (9, 9))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, resize(narrow.float(), (9, 9)).bfloat16())
    assert torch.equal(single, resize(x, (9, 9)))


def test_axes_in_front_are_kept_and_an_empty_batch_stays_one():
    assert resize(torch.randn(5, 4, 4), (8, 2)).shape == (5, 8, 2)
    assert resize(torch.randn(0, 3, 4, 4), (8, 8)).shape == (0, 3, 8, 8)
