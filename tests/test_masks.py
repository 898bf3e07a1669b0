"""Block masks and the edge of the picture."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.errors import ConfigError
from cegate.masks import BlockMask, inside


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(0, 9))
def test_a_mask_is_constant_on_its_blocks(ratio, block, height, width, slot):
    kept = BlockMask(ratio, block).draw((height, width), 5, 3, [slot])[0, 0]
    assert kept.shape == (height, width) and kept.dtype == torch.bool
    for top in range(0, height, block):
        for left in range(0, width, block):
            cell = kept[top : top + block, left : left + block]
            assert cell.all() or not cell.any()


def test_the_share_of_hidden_blocks_is_the_ratio():
    for ratio in (0.1, 0.5, 0.7):
        kept = BlockMask(ratio, 4).draw((256, 256), 1, 2, range(4))[..., ::4, ::4]
        hidden = 1 - kept.float().mean()
        assert abs(hidden - ratio) < 3 * math.sqrt(ratio * (1 - ratio) / kept.numel())


def test_the_ends_hide_nothing_and_all():
    assert BlockMask(0, 8).draw((64, 64), 0, 0, [0, 1]).all()
    assert not BlockMask(1, 8).draw((64, 64), 0, 0, [0, 1]).any()


def test_a_mask_is_a_function_of_seed_iteration_slot_and_purpose():
    mask = BlockMask(0.5, 4)
    first = mask.draw((64, 64), 1, 2, [0, 1, 2])
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(first, mask.draw((64, 64), 1, 2, [0, 1, 2]))
    assert torch.equal(first[2:], mask.draw((64, 64), 1, 2, [2]))  # whatever else is in the batch
    others = [
        mask.draw((64, 64), 2, 2, [0, 1, 2]),
        mask.draw((64, 64), 1, 3, [0, 1, 2]),
        BlockMask(0.5, 4, section="style").draw((64, 64), 1, 2, [0, 1, 2]),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])


def test_the_value_of_a_mask_is_written_down():
    """It must not change between versions, or a run could not be resumed."""
    kept = BlockMask(0.5, 1).draw((2, 4), 42, 7, [1])
    assert "".join(map(str, kept.int().flatten().tolist())) == "01110101"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5, "block": 64}, r"mim.ratio=1.5 is no share of blocks; use 0 \(none\) to 1 \(all\)"),
        ({"ratio": float("nan"), "block": 64}, "mim.ratio=nan is no share"),
        ({"ratio": -0.1, "block": 0}, "ratio=-0.1 .*; mim.block=0 is no side"),
        ({"ratio": 0.5, "block": 64, "crop": 32}, "mim.block=64 is larger than the crop, data.crop=32; use 32 or less"),
        ({"ratio": 2, "block": 64, "section": "style"}, "style.ratio=2 is no share"),
    ],
)
def test_bad_masks_name_the_key(options, message):
    with pytest.raises(ConfigError, match=message):
        BlockMask(**options)


def test_the_picture_ends_where_it_is_filled_up():
    images = torch.randn(4, 3, 8, 10)
    images[0, :, 6:], images[0, :, :, 4:] = 0, 0
    images[1, :, 2] = 0  # a row within the picture is picture
    images[2] = 0
    found = inside(images)
    expected = torch.ones(4, 1, 8, 10, dtype=torch.bool)
    expected[0, :, 6:], expected[0, :, :, 4:], expected[2] = False, False, False
    assert torch.equal(found, expected)
