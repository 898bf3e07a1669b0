from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cegate.convert_mfnet import convert_weights
from cegate.errors import ConfigError
from cegate.heads.unetformer import UNetFormerHead, extend

CHANNELS, CLASSES = 12, 3


def pyramid(grid: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Maps of 4, 2, 1 and 1/2 times a token grid."""
    sides = [tuple(scale * side for side in grid) for scale in (4, 2, 1)] + [tuple(-(-side // 2) for side in grid)]
    return [torch.randn(batch, CHANNELS, *side, dtype=dtype, requires_grad=True) for side in sides]


def small_head(**options) -> UNetFormerHead:
    return UNetFormerHead(CHANNELS, CLASSES, **{"width": 16, "heads": 4, "window": 8, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decoder_is_the_published_one(dtype, shared):
    stored = np.load(shared / "vectors" / "mfnet_pyramid.npz")
    vector = {k: torch.as_tensor(stored[k]).to(dtype) for k in stored}
    weights, grads = (
        convert_weights({k[2:]: v for k, v in vector.items() if k.startswith(p)}).weights["head"] for p in ("w.", "g.")
    )
    head = UNetFormerHead(32, 3, width=32).to(dtype).eval()
    head.load_state_dict(weights, strict=True)
    maps = [vector[f"fused{level}"].clone().requires_grad_() for level in (1, 2, 3, 4)]

    z = head.blocks[0](head.start(maps[3]))
    assert (z - vector["dec_b4"]).abs().max() < 1e-5 * z.abs().max()
    z = head.fusions[0](z, maps[2])
    assert (z - vector["dec_p3"]).abs().max() < 1e-5 * z.abs().max()

    logits = head(maps, (160, 256))
    assert (logits - vector["logits"]).abs().max() < 1e-5 * logits.abs().max()
    if dtype == torch.float32:
        return  # one value lies 3e-7 from a corner of ReLU6, which float32 may miss
    (logits * vector["probe"]).sum().backward()
    for name, weight in head.named_parameters():
        assert (weight.grad - grads[name]).abs().max() <= 1e-5 * grads[name].abs().max(), name


def test_decoder_with_other_widths_is_the_published_one(shared):
    stored = np.load(shared / "vectors" / "mfnet_decoder.npz")
    weights = {f"decoder.{k[4:]}": torch.as_tensor(stored[k]) for k in stored if k.startswith("dec.")}
    head = UNetFormerHead(16, 5, width=16).eval()
    head.load_state_dict(convert_weights(weights).weights["head"], strict=True)
    logits = head([torch.as_tensor(stored[f"r{n}"]) for n in (1, 2, 3, 4)], (256, 256))
    theirs = torch.as_tensor(stored["logits"])
    assert (logits - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_weights_are_as_many_as_the_papers():
    assert sum(w.numel() for w in UNetFormerHead(256, 6).parameters()) == 515_102


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8), (2, 11)], ids=str)
@pytest.mark.parametrize("skips", [True, False])
def test_any_grid_gives_logits_of_any_size(grid, skips):
    """Maps smaller than a window or than a mirror too."""
    head = small_head(skips=skips).eval()
    maps = pyramid(grid)
    logits = head(maps if skips else maps[2:3], (50, 33))
    assert logits.shape == (2, CLASSES, 50, 33)
    logits.square().sum().backward()
    assert all(w.grad.isfinite().all() for w in head.parameters())


def test_in_evaluation_mode_no_sample_knows_of_another():
    head, maps = small_head().double().eval(), pyramid((3, 5), 3, torch.float64)
    labels = torch.randint(0, CLASSES, (3, 48, 80))
    labels[0, :30] = 255
    together = head.loss(maps, labels)
    alone = torch.cat([head.loss([m[b : b + 1] for m in maps], labels[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=0)
    together[1].backward()
    assert all(m.grad[[0, 2]].abs().sum() == 0 and m.grad[1].abs().sum() > 0 for m in maps)


def test_in_train_mode_statistics_move_and_are_kept_with_the_weights():
    head = small_head()
    before = {k: v.clone() for k, v in head.state_dict().items() if "running_mean" in k}
    head(pyramid((3, 5)), (48, 80))
    after = head.state_dict()
    assert before and all(not torch.equal(before[k], after[k]) for k in before)


def test_attention_sees_its_window_and_means_carry_it_on():
    """A change at one place is felt at places that no convolution of the decoder's block reaches."""
    block = small_head().blocks[0].attention.eval()
    z = torch.randn(1, 16, 24, 24)
    changed = z.clone()
    changed[0, :, 0, 0] += 1
    felt = (block(changed) - block(z)).abs().sum(1)[0] > 1e-7
    assert felt[:8, :8].all()
    assert not felt[16:, 16:].any()


def test_windowed_attention_is_attention_with_a_bias_by_step():
    attention = small_head().blocks[0].attention.double()
    z = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    torch.nn.init.normal_(attention.position)
    q, k, v = F.conv2d(z, attention.qkv.weight).flatten(2).unflatten(1, (3, 4, 4))[0].mT  # [heads, tokens, d] each
    y, x = torch.arange(64) // 8, torch.arange(64) % 8
    bias = attention.position[(y[:, None] - y + 7) * 15 + x[:, None] - x + 7].permute(2, 0, 1)
    expected = ((q @ k.mT / 2 + bias).softmax(-1) @ v).mT.reshape(16, 8, 8)
    torch.testing.assert_close(attention._attend(z)[0], expected)


def test_maps_are_mirrored_where_they_can_be():
    z = torch.arange(12.0).view(1, 1, 3, 4)
    torch.testing.assert_close(extend(z, 2, 3), F.pad(z, (0, 3, 0, 2), mode="reflect"))
    tall = extend(z, 3, 1)
    torch.testing.assert_close(tall[..., 3:, :4], z[..., 2:, :].expand(-1, -1, 3, -1))


def test_shares_of_a_fusion_are_positive_and_add_up_to_one():
    fusion = small_head().fusions[0].eval()
    fusion.weights.data = torch.tensor([-1.0, 0.5])
    finer, z = torch.randn(1, CHANNELS, 8, 8), torch.randn(1, 16, 4, 4)
    upsampled = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fusion(z, finer), fusion.smooth(upsampled))


def test_no_pyramid_is_one_line():
    flat = [torch.randn(1, CHANNELS, 6, 6) for _ in range(4)]
    with pytest.raises(ConfigError, match=r"unetformer takes four maps, each of half the side .* modal.fusion=dfm"):
        small_head()(flat, (96, 96))
    with pytest.raises(ConfigError, match="width=20 of the decoder is not a multiple of its 8 attention heads"):
        UNetFormerHead(CHANNELS, CLASSES, width=20)
