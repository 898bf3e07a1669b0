"""GSE, injectors, the visual prompt and the decoders that restore an image."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from cegate.errors import ConfigError
from cegate.parts.gse import GSE
from cegate.parts.injector import Injection, Injector
from cegate.parts.restore import DECODERS, FullAspp, PerLevel, build_decoder
from cegate.parts.visual_prompt import VisualPrompt

WIDTHS = (4, 6, 8, 10)


class Features(NamedTuple):
    maps: list
    grid: tuple = (2, 3)


class Tokens(NamedTuple):
    prefix: int
    grid: tuple = (2, 3)


def injected(injection: Injection, images: torch.Tensor, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    return injection.change(Features(maps), images).maps


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def opened(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that let everything through."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def test_sizes_at_full_width_are_those_of_the_specification():
    with torch.device("meta"):
        assert round(count(GSE(3, 1024)) / 1e6, 2) == 6.27
        assert round(count(Injector(1024)) / 1e6, 2) == 1.06


@pytest.mark.parametrize("grid", [(2, 3), (4, 5)], ids=str)
def test_queries_lie_on_the_token_grid_row_by_row(grid):
    gse, images = opened(GSE(4, 12, WIDTHS)), torch.randn(2, 4, 32, 48)
    queries = gse(images, grid)
    assert queries.shape == (2, grid[0] * grid[1], 12)
    x = images
    for layer, stride in zip(gse.layers, (2, 2, 2, 2, 1), strict=True):
        x = F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=1).clamp(min=0)
    x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False) if grid != (2, 3) else x
    torch.testing.assert_close(queries[1, grid[1] + 1], x[1, :, 1, 1])


def attention_by_hand(injector: Injector, f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    q = injector.query(injector.norm_query(g))
    k, v = injector.key(injector.norm_feature(f)), injector.value(injector.norm_feature(f))
    width = q.shape[-1] // injector.heads
    found = []
    for head in range(injector.heads):
        part = slice(head * width, (head + 1) * width)
        share = (q[..., part] @ k[..., part].mT / math.sqrt(width)).softmax(-1)
        found.append(share @ v[..., part])
    return injector.out(torch.cat(found, -1))


def test_an_injector_is_cross_attention_of_queries_to_features():
    injector = opened(Injector(12, 8, 2)).double()
    f, g = torch.randn(2, 6, 12).double(), torch.randn(2, 6, 12).double()
    expected = attention_by_hand(injector, f, g)
    torch.testing.assert_close(injector(f, g), f + injector.gamma * expected)
    bare = Injector(12, 8, 2, residual=False).double()
    bare.load_state_dict({k: v for k, v in injector.state_dict().items() if k != "gamma"})
    torch.testing.assert_close(bare(f, g), expected)
    assert bare(f, torch.randn(2, 9, 12).double()).shape == (2, 9, 12)  # queries of another grid


@pytest.mark.parametrize("chain", [False, True])
def test_a_fresh_injection_changes_nothing_to_the_last_bit(chain):
    injection = Injection(3, 12, width=8, heads=2, chain=chain, widths=WIDTHS)
    maps = [torch.randn(2, 12, 2, 3, requires_grad=True) for _ in range(4)]
    found = injected(injection, torch.randn(2, 3, 32, 48), maps)
    assert all(torch.equal(a, b) for a, b in zip(found, maps, strict=True))
    sum(m.square().sum() for m in found).backward()
    assert injection.injectors[0].gamma.grad.abs().sum() > 0  # and learns
    assert not injection.gse.layers[0].weight.grad.any()


def test_once_gamma_is_open_the_extractor_learns():
    injection = opened(Injection(3, 12, width=8, heads=2, widths=WIDTHS))
    found = injected(injection, torch.randn(2, 3, 32, 48), [torch.randn(2, 12, 2, 3) for _ in range(4)])
    sum(m.square().sum() for m in found).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in injection.gse.parameters())


def test_in_a_chain_a_stage_asks_with_what_the_one_before_found():
    injection = opened(Injection(3, 12, width=8, heads=2, chain=True, widths=WIDTHS))
    images, maps = torch.randn(1, 3, 32, 48), [torch.randn(1, 12, 2, 3) for _ in range(4)]
    queries = injection.gse(images, (2, 3))
    found = injected(injection, images, maps)
    for injector, features, result in zip(injection.injectors, maps, found, strict=True):
        queries = injector(features.flatten(2).mT, queries)
        torch.testing.assert_close(result.flatten(2).mT, queries)


def test_samples_do_not_meet_and_a_switch_leaves_it_out_at_test():
    injection = opened(Injection(3, 12, width=8, heads=2, test=False, widths=WIDTHS))
    images, maps = torch.randn(3, 3, 32, 48), [torch.randn(3, 12, 2, 3) for _ in range(4)]
    together = injected(injection, images, maps)
    alone = injected(injection, images[1:2], [m[1:2] for m in maps])
    torch.testing.assert_close(together[3][1:2], alone[3])
    injection.eval()
    assert injected(injection, images, maps)[0] is maps[0]


def test_at_blocks_the_prefix_passes_and_no_call_is_kept():
    injection = opened(Injection(3, 12, [1, 3], at="blocks", width=8, heads=2, widths=WIDTHS))
    one, other = torch.randn(2, 1, 3, 32, 48)
    y = torch.randn(1, 1 + 6, 12)
    plugs = injection.plugs_of_call(one, (2, 3))
    injection.plugs_of_call(other, (2, 3))  # a second call in between
    assert [(plug.port, plug.layer) for plug in plugs] == [("block", 1), ("block", 3)]
    found = plugs[1].function(y, Tokens(1))
    assert torch.equal(found[:, 0], y[:, 0])
    torch.testing.assert_close(found[:, 1:], injection.injectors[1](y[:, 1:], injection.gse(one, (2, 3))))
    maps = [torch.randn(1, 12, 2, 3)]
    assert injected(injection, one, maps) is maps
    assert not list(injection.plugs())
    with pytest.raises(ConfigError, match=r"injector.chain=true goes with injector.at=outputs"):
        Injection(3, 12, [1], at="blocks", chain=True)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"injector.width=10 is not a positive multiple of injector.heads=4; .* 8"):
        Injector(12, 10, 4)


# --- prompt ---------------------------------------------------------------------------------------------------------


def test_the_prompt_fills_what_is_hidden_and_learns_there_alone():
    prompt, images = VisualPrompt(3, 16), torch.randn(2, 3, 8, 12)
    kept = torch.rand(2, 1, 8, 12) > 0.5
    assert torch.equal(prompt(images, kept), images * kept)  # v starts at 0
    with torch.no_grad():
        prompt.value.normal_()
    found = prompt(images, kept)
    assert torch.equal(found, torch.where(kept, images, prompt.value[..., :8, :12]))
    found.square().sum().backward()
    grad = prompt.value.grad[0, :, :8, :12]
    hidden_somewhere = (~kept).any(0).expand_as(grad)
    assert (grad[hidden_somewhere] != 0).all() and not grad[~hidden_somewhere].any()
    assert not prompt.value.grad[..., 8:, :].any()


def test_the_other_two_forms():
    images, kept = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    for mode in ("add", "literal"):
        prompt = VisualPrompt(3, 8, mode)
        with torch.no_grad():
            prompt.value.normal_()
        expected = images * kept + prompt.value if mode == "add" else images * kept * prompt.value
        assert torch.equal(prompt(images, kept), expected)
    with pytest.raises(ConfigError, match="the visual prompt is 8 px wide, the images are 8 x 9"):
        prompt(torch.randn(1, 3, 8, 9), torch.ones(1, 1, 8, 9, dtype=torch.bool))


# --- decoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_restores_every_band_and_no_samples_meet(name):
    decoder = opened(build_decoder(name, 12, 5))
    maps = [torch.randn(2, 12, 3, 4) for _ in range(4)]
    found = decoder(maps, (48, 60))
    assert found.shape == (2, 5, 48, 60)
    torch.testing.assert_close(decoder([m[1:] for m in maps], (48, 60)), found[1:], rtol=1e-4, atol=1e-3)
    assert decoder(maps, (3, 4)).shape == (2, 5, 3, 4)


def test_each_level_has_its_own_dilation():
    decoder = opened(PerLevel(6, 3, width=5)).double()
    maps = [torch.randn(1, 6, 20, 22).double() for _ in range(4)]
    seen = []
    for level, features, d in zip(decoder.levels, maps, (1, 6, 12, 18), strict=True):
        mean, deviation = features.mean(1, keepdim=True), (features.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        features = (features - mean) / deviation
        padded = F.pad(features, (d, d, d, d))
        taps = [padded[..., i * d : i * d + 20, j * d : j * d + 22] for i in range(3) for j in range(3)]
        y = torch.einsum("tbchw,oct->bohw", torch.stack(taps), level.weight.flatten(2)) + level.bias[:, None, None]
        seen.append(y.clamp(min=0))
    image = torch.einsum("bchw,oc->bohw", torch.cat(seen, 1), decoder.linear.weight[..., 0, 0])
    image = image + decoder.linear.bias[:, None, None]
    expected = F.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(maps, (64, 64)), expected)


def test_enlarging_last_gives_the_same_as_enlarging_first():
    """The shared pyramid as it is described: enlarge, put side by side, then merge."""
    decoder = opened(FullAspp(6, 3, width=4)).double()
    maps = [torch.randn(1, 6, 4, 5).double() for _ in range(4)]
    grids = (16, 20), (8, 10), (4, 5), (2, 3)
    resize = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # noqa: E731
    levels = [resize(decoder.pyramid(resize(m, grid)), (40, 48)) for m, grid in zip(maps, grids, strict=True)]
    expected = decoder.linear(decoder.merge(torch.cat(levels, 1)).relu())
    torch.testing.assert_close(decoder(maps, (40, 48)), expected)


def test_an_unknown_decoder_is_refused():
    with pytest.raises(
        ConfigError, match=r"mim.decoder='aspp' is not one of per_level, full_aspp, linear; did you mean"
    ):
        build_decoder("aspp", 8, 3)
