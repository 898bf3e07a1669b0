from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cegate.backbone.backbone import Features
from cegate.convert_mfnet import convert_weights
from cegate.necks.dfm import DFM, StreamSum, sam_neck


def test_pyramids_and_fusion_are_the_published_ones(shared):
    stored = np.load(shared / "vectors" / "mfnet_pyramid.npz")
    vector = {k: torch.as_tensor(stored[k]).double() for k in stored}
    weights = convert_weights({k[2:]: v for k, v in vector.items() if k.startswith("w.")}).weights["fusion"]
    neck = DFM(32, width=32, official_norm=True).double().eval()
    neck.load_state_dict(weights, strict=True)
    levels = neck.pyramids((vector["F_x"], vector["F_y"]))
    for level in (2, 4):
        for ours, name in zip(levels[level - 1], ("x", "y"), strict=True):
            torch.testing.assert_close(ours, vector[f"fpn{level}{name}"], rtol=1e-5, atol=1e-6)
    fused = neck(torch.cat([vector["F_x"], vector["F_y"]]))
    for level, ours in enumerate(fused):
        theirs = vector[f"fused{level + 1}"]
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("official", [False, True])
def test_weights_are_as_many_as_the_papers(official):
    assert sum(w.numel() for w in DFM(256, official_norm=official).parameters()) == 1_643_136


@pytest.mark.parametrize(
    ("grid", "sides"), [((16, 16), [64, 32, 16, 8]), ((5, 5), [20, 10, 5, 3]), ((1, 1), [4, 2, 1, 1])]
)
@pytest.mark.parametrize("streams", [1, 2])
def test_scales_are_four_two_one_and_half_of_the_grid(grid, sides, streams):
    neck = DFM(32, width=32, streams=streams)
    maps = neck(torch.randn(streams * 2, 32, *grid))
    assert [tuple(m.shape) for m in maps] == [(2, 32, side, side) for side in sides]


def test_modalities_keep_weights_of_their_own():
    neck = DFM(16, width=16).double()
    x, y = torch.randn(2, 2, 16, 4, 4, dtype=torch.float64)
    fused = neck(torch.cat([x, y]))
    for modules in (neck.finest, neck.finer, *neck.weigh):
        first, second = (module.state_dict() for module in modules)
        first, second = ({k: v.clone() for k, v in state.items()} for state in (first, second))
        modules[0].load_state_dict(second), modules[1].load_state_dict(first)
    for ours, swapped in zip(fused, neck(torch.cat([y, x])), strict=True):
        torch.testing.assert_close(ours, swapped)


def test_a_backbones_own_neck_stays_frozen_and_another_width_gets_one_that_learns():
    own = sam_neck(24, 16).requires_grad_(False)
    neck = DFM(24, width=16, project=lambda z: own(z))
    assert not any(name.startswith("learned") for name, _ in neck.named_parameters())
    assert len(neck.state_dict()) == len(DFM(16, width=16).state_dict())
    features = torch.randn(4, 24, 4, 4, requires_grad=True)
    sum(m.sum() for m in neck(features)).backward()
    assert features.grad.any()
    assert all(w.grad is None for w in own.parameters())
    learned = DFM(24, width=16)
    sum(m.sum() for m in learned(features)).backward()
    assert all(w.grad is not None for w in learned.learned_projection.parameters())


def test_sum_of_modalities_serves_heads_of_four_maps_and_decoders_without_skips():
    maps = [torch.randn(4, 16, 3, 5) for _ in range(4)]
    features = Features(maps, (3, 5))
    every = StreamSum(16, last=False).change(features, None).maps
    assert all(torch.equal(ours, m[:2] + m[2:]) for ours, m in zip(every, maps, strict=True))
    project = nn.Conv2d(16, 8, 1).requires_grad_(False)
    (last,) = StreamSum(16, width=8, project=lambda z: project(z)).change(features, None).maps
    torch.testing.assert_close(last, project(maps[-1][:2]) + project(maps[-1][2:]))


def test_excitation_is_a_gate_of_the_mean():
    neck = DFM(16, width=16, streams=1)
    weigh, z = neck.weigh[2][0], torch.randn(2, 16, 3, 3)
    gate = (
        weigh.up.weight[..., 0, 0] @ (weigh.down.weight[..., 0, 0] @ z.mean((2, 3)).T + weigh.down.bias[:, None]).relu()
    ).T
    torch.testing.assert_close(weigh(z), z * (gate + weigh.up.bias).sigmoid()[..., None, None])
    torch.testing.assert_close(neck(z)[2], weigh(z))
