"""Earth-style injection: by hand in float64, and what must hold of every styled image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cegate.draws import generator
from cegate.errors import CheckpointError, ConfigError
from cegate.style.injection import EarthStyleInjection
from cegate.style.networks import ColourStatistics
from cegate.style.statistics import StyleStatistics

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def spread(dim: int = 6) -> StyleStatistics:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(dim, dim)) * 0.02
    return StyleStatistics(np.array([0.5, 0.4, 0.3, 0.2, 0.15, 0.1][:dim]), a @ a.T)


def injection(bands: int = 3, **options) -> EarthStyleInjection:
    extra = bands - 3
    mean, std = (MEAN + (0.4,) * extra)[:bands], (STD + (0.2,) * extra)[:bands]
    return EarthStyleInjection(ColourStatistics(), spread(), mean=mean, std=std, **options)


def normalised(batch: int = 2, bands: int = 3, size: tuple[int, int] = (12, 16)) -> torch.Tensor:
    own = injection(bands)
    return (torch.rand(batch, bands, *size) - own.mean) / own.std


def checkerboard(batch: int, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = torch.arange(size[0])[:, None] // 4, torch.arange(size[1]) // 4
    return ((rows + columns) % 2 == 0).expand(batch, 1, *size)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("region", ["masked", "kept"])
def test_a_styled_image_by_hand(covariance, region):
    """Eq. 1-5 once more in NumPy and float64, pixel by pixel."""
    x, kept = normalised(2), checkerboard(2, (12, 16))
    style = injection(alpha=0.3, covariance=covariance, region=region)
    found = style(x, kept, style.draw(11, 5, [3, 4]))
    expected = np.empty(x.shape)
    values, vectors = np.linalg.eigh(spread().covariance)
    full = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    factor = full if covariance == "full" else np.diag(np.sqrt(values[::-1]))
    for b, slot in enumerate((3, 4)):
        z = generator(11, "style", 5, slot).standard_normal(6)
        elsewhere = spread().mean + factor @ z
        rgb = x[b].double().numpy() * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))
        own = np.array([*(c.mean() for c in rgb), *(c.std() for c in rgb)])
        e = 0.3 * elsewhere + 0.7 * own
        for c in range(3):
            styled = np.clip((rgb[c] - own[c]) / own[3 + c] * max(e[3 + c], 0) + e[c], 0, 1)
            for i in range(12):
                for j in range(16):
                    hidden = not kept[b, 0, i, j]
                    takes_style = hidden if region == "masked" else not hidden
                    pixel = (styled[i, j] - MEAN[c]) / STD[c]
                    expected[b, c, i, j] = pixel if takes_style else x[b, c, i, j]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("region", ["masked", "kept"])
def test_what_is_not_styled_is_untouched_to_the_last_bit(region):
    x, kept = normalised(3), checkerboard(3, (12, 16))
    style = injection(region=region)
    found = style(x, kept, style.draw(0, 0, range(3)))
    untouched = kept if region == "masked" else ~kept
    assert torch.equal(found[untouched.expand_as(x)], x[untouched.expand_as(x)])
    assert (found != x)[~untouched.expand_as(x)].float().mean() > 0.99


def test_a_share_of_nothing_is_the_images_own_style():
    x = normalised()
    style = injection(alpha=0.0)
    found = style(x, torch.zeros(2, 1, 12, 16, dtype=torch.bool), style.draw(0, 0, [0, 1]))
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


def test_without_normalising_again_the_image_lies_in_0_to_1():
    x = normalised()
    kept = checkerboard(2, (12, 16))
    found = injection(renormalize=False)(x, kept, injection().draw(0, 0, [0, 1]))
    assert found.min() >= 0 and found.max() <= 1
    again = (found - injection().mean) / injection().std
    torch.testing.assert_close(again, injection()(x, kept, injection().draw(0, 0, [0, 1])), atol=1e-5, rtol=0)


def test_a_sample_is_styled_alike_in_every_batch():
    x, kept = normalised(3), checkerboard(3, (12, 16))
    style = injection()
    together = style(x, kept, style.draw(4, 7, [0, 1, 2]))
    alone = [style(x[b : b + 1], kept[b : b + 1], style.draw(4, 7, [b])) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.equal(style.draw(4, 7, [0]), style.draw(4, 8, [0]))


def test_what_is_filled_up_is_neither_seen_nor_styled():
    x = normalised(2)
    small = x[0, :, :8, :12].clone()
    x[0, :, 8:], x[0, :, :, 12:] = 0, 0
    style, nothing = injection(), torch.zeros(2, 1, 12, 16, dtype=torch.bool)
    found = style(x, nothing, style.draw(0, 0, [0, 1]))
    assert not found[0, :, 8:].any() and not found[0, :, :, 12:].any()
    alone = style(small[None], nothing[:1, :, :8, :12], style.draw(0, 0, [0]))
    torch.testing.assert_close(found[:1, :, :8, :12], alone)
    assert torch.equal(style(x * 0, nothing, style.draw(0, 0, [0, 1])), x * 0)


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_any_number_of_bands(bands):
    x = normalised(2, bands)
    style = injection(bands)
    found = style(x, torch.zeros(2, 1, 12, 16, dtype=torch.bool), style.draw(0, 0, [0, 1]))
    assert found.shape == x.shape and found.isfinite().all()
    assert torch.equal(found[:, 3:], x[:, 3:])  # further bands pass
    assert not torch.equal(found[:, : min(bands, 3)], x[:, : min(bands, 3)])


def test_no_gradient_passes():
    x = normalised().requires_grad_()
    style = injection()
    assert not style(x, checkerboard(2, (12, 16)), style.draw(0, 0, [0, 1])).requires_grad
    assert not list(style.parameters()) and not style.state_dict()


def test_bad_settings_name_the_key():
    with pytest.raises(ConfigError, match=r"style.alpha=1.5 is no share of a style; use 0"):
        injection(alpha=1.5)
    with pytest.raises(CheckpointError, match=r"is of embeddings of 4 numbers, but colour statistics .* has 6"):
        EarthStyleInjection(ColourStatistics(), spread(4), mean=MEAN, std=STD)
