"""Plain resampling against the published conversion of DINOv2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cegate.backbone.resample import published_positions, resample_patch, resample_plain, resample_positions


@pytest.fixture(scope="module")
def vectors(shared):
    with np.load(shared / "vectors" / "dinov2_resample_plain.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def test_patch_and_positions_are_the_published_ones(vectors):
    state = {"patch_embed.proj.weight": vectors["patch_before"], "pos_embed": vectors["pos_before"], "norm": 3}
    found = resample_plain(state, patch=16, grid=(32, 32))
    torch.testing.assert_close(found["patch_embed.proj.weight"], vectors["patch_after"], atol=2e-6, rtol=0)
    torch.testing.assert_close(found["pos_embed"], vectors["pos_after"], atol=2e-6, rtol=0)
    assert torch.equal(found["pos_embed"][:, 0], vectors["pos_before"][:, 0])
    assert found["norm"] == 3


def test_tokens_of_the_new_kernel_are_the_published_ones(vectors):
    kernel = resample_patch(vectors["patch_before"], 16)
    tokens = F.conv2d(vectors["image"].double(), kernel.double(), vectors["patch_bias"].double(), stride=16)
    torch.testing.assert_close(tokens.flatten(2).mT, vectors["patch_tokens"].double(), atol=1e-5, rtol=1e-5)


def test_positions_of_a_forward_pass_on_another_grid(vectors):
    grid = tuple(vectors["runtime_size"].tolist())
    found = published_positions(vectors["pos_after"], grid)
    torch.testing.assert_close(found, vectors["runtime_after"], atol=1e-5, rtol=0)
    assert (resample_positions(vectors["pos_after"], grid) - found).abs().max() > 0.1  # no resize to a size


def cubic(t: float) -> float:
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_it_is_cubic_convolution_without_antialiasing():
    kernel = torch.randn(2, 3, 5, 5).double()
    n, m = 5, 8
    rows = np.zeros((m, n))
    for i in range(m):
        x = (i + 0.5) * n / m - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            rows[i, min(max(k, 0), n - 1)] += cubic(x - k)
    expected = torch.einsum("ij,abjk,lk->abil", torch.from_numpy(rows), kernel, torch.from_numpy(rows))
    torch.testing.assert_close(resample_patch(kernel, m), expected)


def test_what_fits_is_left_alone(vectors):
    state = {"patch_embed.proj.weight": vectors["patch_after"], "pos_embed": vectors["pos_after"]}
    found = resample_plain(state, patch=16, grid=(32, 32))
    assert all(found[name] is value for name, value in state.items())


def test_positions_without_a_class_token_are_a_grid_alone():
    state = {"pos_embed": torch.randn(1, 16, 3)}
    found = resample_plain(state, patch=8, grid=(6, 5))["pos_embed"]
    torch.testing.assert_close(found, resample_positions(state["pos_embed"], (6, 5), 0))
