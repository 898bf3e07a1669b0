from __future__ import annotations

import numpy as np
import pytest

from cegate.data.erosion import erode_labels


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_a_pixel_stays_if_all_known_pixels_of_its_disc_are_of_its_class(radius):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((6, 6), int)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.02] = 255
    eroded = erode_labels(labels, radius)
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            disc = [
                labels[v, u]
                for v in range(max(0, y - radius), min(height, y + radius + 1))
                for u in range(max(0, x - radius), min(width, x + radius + 1))
                if (v - y) ** 2 + (u - x) ** 2 <= radius**2 and labels[v, u] != 255
            ]
            kept = labels[y, x] != 255 and len(set(disc)) == 1
            assert eroded[y, x] == (labels[y, x] if kept else 255)
    assert eroded.dtype == labels.dtype


def test_a_boundary_loses_three_pixels_on_either_side_by_default():
    labels = np.repeat([[0, 1]], 10, axis=1).reshape(1, -1).repeat(9, 0)
    assert [(row == 255).sum() for row in erode_labels(labels)] == [6] * 9
