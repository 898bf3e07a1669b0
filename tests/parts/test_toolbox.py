"""The toolbox on real timm blocks: what is off leaves no trace, what is on does what the formulas say."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import cegate
from cegate.backbone.backbone import Backbone
from cegate.backbone.blocks import read_form, read_weights, run_block
from cegate.backbone.ports import Circuit, Tokens
from cegate.backbone.stream import Stream
from cegate.config import FrequencyConfig, SemanticConfig, SpatialConfig, ToolboxConfig
from cegate.errors import BackboneError, ConfigError
from cegate.gate import GatePlan
from cegate.parts.part import Use
from cegate.parts.toolbox import Toolbox, wrap

SMALL = ToolboxConfig(
    spatial=SpatialConfig(rank=4), semantic=SemanticConfig(width=6), frequency=FrequencyConfig(width=5)
)

# name, options: plain, registers, rotary with fused and with separate projections, bias added by hand
BACKBONES = {
    "augreg": ("vit_tiny_patch16_224", {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3-qkv-bias": ("vit_small_patch16_dinov3_qkvb", {}),
    "eva02-fused": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "eva02-separate": ("eva02_base_patch14_224", {"patch_size": 16, "embed_dim": 192, "num_heads": 3}),
    "deit3": ("deit3_small_patch16_224", {}),
    "mae": ("vit_base_patch16_224.mae", {"embed_dim": 192, "num_heads": 3}),
}


def make_vit(key: str, depth: int = 2) -> torch.nn.Module:
    name, options = BACKBONES[key]
    return timm.create_model(
        name, pretrained=False, num_classes=0, img_size=64, dynamic_img_size=True, depth=depth, **options
    ).eval()


def randomise(toolbox: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in toolbox.parameters():
            parameter.normal_(std=0.2)


@pytest.fixture(params=BACKBONES)
def vit(request) -> torch.nn.Module:
    return make_vit(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 48, 80)


def tokens(vit, images):
    with torch.no_grad():
        return vit.forward_features(images)


def tokens_with(toolbox, uses, images):
    with torch.no_grad():
        backbone = toolbox.backbone
        found, _ = backbone.tokens_after(images, [backbone.depth - 1], Circuit(toolbox.plugs(uses)))
        return backbone.vit.norm(found[0])


def test_a_fresh_toolbox_changes_nothing_even_with_every_gate_on(vit, images):
    before = tokens(vit, images)
    toolbox = wrap(vit, SMALL)
    toolbox.apply(GatePlan(toolbox.sites))
    torch.testing.assert_close(tokens(vit, images), before, rtol=1e-4, atol=1e-5)


def test_every_site_changes_the_output_and_unwrapping_restores_every_bit(vit, images):
    before, keys, attributes = tokens(vit, images), set(vit.state_dict()), vars(vit).keys() | set()
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    for site in toolbox.sites:
        toolbox.apply(GatePlan([site]))
        assert (tokens(vit, images) - before).abs().max() > 1e-4, site
    assert toolbox.unwrap() is vit
    assert torch.equal(tokens(vit, images), before)
    assert set(vit.state_dict()) == keys
    assert vars(vit).keys() == attributes


def test_a_wrapped_model_has_no_hook_and_its_own_passes_agree(vit, images):
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    toolbox.apply(GatePlan(toolbox.sites))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    last, maps = vit.forward_intermediates(images, indices=2, return_prefix_tokens=True, norm=True)
    assert torch.equal(last, vit.forward_features(images))
    prefix = vit.num_prefix_tokens
    assert torch.equal(maps[-1][0], last[:, prefix:].mT.unflatten(2, (3, 5)))
    assert torch.equal(maps[-1][1], last[:, :prefix])
    only = vit.forward_intermediates(images, indices=[0], output_fmt="NLC", intermediates_only=True, stop_early=True)
    assert only[0].shape == (2, 15, vit.embed_dim)


def test_apply_takes_a_function_as_every_module_does(vit):
    toolbox, seen = wrap(vit, SMALL), []
    torch.nn.ModuleList([toolbox]).apply(lambda module: seen.append(type(module)))
    assert type(toolbox) in seen and torch.nn.ModuleList in seen
    assert toolbox.plan == GatePlan()


def test_one_block_follows_the_formulas(images):
    vit = make_vit("dinov2-registers", depth=1)
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    toolbox.apply(GatePlan(toolbox.sites))
    lora, adapter, earth = toolbox.spatial[0], toolbox.semantic[0], toolbox.frequency[0]
    block, prefix = vit.blocks[0], vit.num_prefix_tokens
    x = torch.randn(2, prefix + 80, vit.embed_dim)
    with torch.no_grad():
        ports = Circuit(toolbox.plugs()).at(0)
        stream, tokens = Stream(x), Tokens(prefix, (8, 10))
        got = run_block(read_form(block, "block"), read_weights(block), stream, None, ports, tokens).total()
        u = block.norm1(x)
        q, k, v = block.attn.qkv(u).chunk(3, -1)
        q, v = q + u @ lora.down_q.T @ lora.up_q.T, v + u @ lora.down_v.T @ lora.up_v.T
        heads = [t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x_att = x + block.ls1(block.attn.proj(attended))
        y = x_att + block.ls2(block.mlp(block.norm2(x_att)))
        y = y + 0.1 * (F.gelu(x_att @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias)
        patches = y[:, prefix:]
        spectrum = torch.fft.fftshift(torch.fft.fft2(patches.mT.unflatten(-1, (8, 10)), norm="ortho"), dim=(-2, -1))
        keep = torch.zeros(8, 10)
        keep[3:5, 4:6] = 1  # c = int(8 * 0.3 // 2) = 1: rows and columns -1 and 0 around the centre
        low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1)), norm="ortho").real.flatten(-2).mT
        experts = [
            F.relu(t @ earth.down[j].T + earth.down_bias[j]) @ earth.up[j].T + earth.up_bias[j]
            for j, t in enumerate((patches, low, patches - low))
        ]
        weights = (patches @ earth.router.T + earth.router_bias).softmax(-1)
        mixture = sum(weights[..., j : j + 1] * e for j, e in enumerate(experts))
        expected = torch.cat([y[:, :prefix], patches + earth.scale * mixture], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Nothing:
    def linear(self, site, unpack, inputs, grads):
        pass

    def direct(self, site, name, grads):
        pass


def test_a_tapped_pass_has_the_output_and_the_input_gradient_of_the_plain_one(vit, images):
    def run():
        images.grad = None
        out = vit.forward_features(images)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out.detach(), images.grad

    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    toolbox.apply(GatePlan(toolbox.sites))
    images.requires_grad_()
    fast, gradient = run()
    with toolbox.tapped(Nothing()):
        tapped, tapped_gradient = run()
    torch.testing.assert_close(tapped, fast, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tapped_gradient, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_only_active_sites_learn_and_frozen_ones_still_contribute(images):
    vit = make_vit("augreg")
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    before = tokens(vit, images)
    toolbox.apply(GatePlan(["spatial.1"], frozen=["frequency.0"]))
    with_frozen = vit.forward_features(images)
    assert (with_frozen - before).abs().max() > 1e-4
    with_frozen.sum().backward()
    learned = {n for n, p in toolbox.named_parameters() if p.grad is not None}
    assert learned == {f"spatial.1.{w}" for w in ("down_q", "down_v", "up_q", "up_v")}
    assert set(toolbox.parameters(active_only=True)) == set(toolbox.parameters_of("spatial.1").values())
    assert all(p.grad is None for p in vit.parameters())


def test_switching_a_site_off_drops_its_gradient(images):
    vit = make_vit("augreg")
    toolbox = wrap(vit, SMALL)
    toolbox.apply(GatePlan(["semantic.0"]))
    vit.forward_features(images).sum().backward()
    toolbox.apply(GatePlan(["semantic.1"]))
    assert all(p.grad is None and not p.requires_grad for p in toolbox.parameters_of("semantic.0").values())


@pytest.mark.parametrize("key", ["augreg", "eva02-separate", "dinov3-qkv-bias"])
def test_merging_keeps_the_output_and_unmerging_every_bit(key, images):
    vit = make_vit(key)
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    weights = copy.deepcopy(vit.state_dict())
    toolbox.apply(GatePlan(toolbox.sites))
    apart = tokens(vit, images)
    toolbox.merge()
    torch.testing.assert_close(tokens(vit, images), apart, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="unmerge"):
        toolbox.apply(GatePlan())
    toolbox.unmerge()
    assert all(torch.equal(value, weights[name]) for name, value in vit.state_dict().items())
    torch.testing.assert_close(tokens(vit, images), apart, rtol=0, atol=0)


def test_a_copy_of_model_and_toolbox_is_independent(images):
    vit = make_vit("augreg")
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    toolbox.apply(GatePlan(toolbox.sites))
    before = tokens(vit, images)
    pair = torch.nn.ModuleDict({"vit": vit, "toolbox": toolbox})
    twin = copy.deepcopy(pair)
    randomise(toolbox)
    assert torch.equal(tokens(twin["vit"], images), before)
    assert not torch.equal(tokens(vit, images), before)


def test_samples_with_sites_of_their_own_equal_each_alone(vit, images):
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    toolbox.apply(GatePlan(["spatial.1"]))
    before = tokens(vit, images)
    uses = {
        "frequency.1": Use([-1, 0]),
        "spatial.0": Use([0, -1]),
        "semantic.1": Use([-1, 0]),
        "frequency.0": Use(),
    }
    together = tokens_with(toolbox, uses, images)
    assert torch.equal(tokens(vit, images), before)
    for b in range(2):
        toolbox.apply(GatePlan(site for site, use in uses.items() if use.adapters is None or use.adapters[b] == 0))
        torch.testing.assert_close(together[b : b + 1], tokens(vit, images[b : b + 1]), rtol=1e-5, atol=1e-5)


def test_lent_weights_take_the_place_of_a_sites_own(vit, images):
    toolbox = wrap(vit, SMALL)
    randomise(toolbox)
    other = copy.deepcopy(toolbox)
    randomise(other)
    lent = {
        site: {
            name: torch.stack([parameter, other.parameters_of(site)[name]]).detach()
            for name, parameter in toolbox.parameters_of(site).items()
        }
        for site in toolbox.sites
    }
    together = tokens_with(toolbox, {site: Use([1, 0], weights) for site, weights in lent.items()}, images)
    toolbox.apply(GatePlan(toolbox.sites))
    torch.testing.assert_close(together[1:], tokens(vit, images[1:]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter, theirs in zip(toolbox.parameters(), other.parameters(), strict=True):
            parameter.copy_(theirs)
    torch.testing.assert_close(together[:1], tokens(vit, images[:1]), rtol=1e-5, atol=1e-5)


def test_scoring_and_dispatching_exclude_each_other():
    toolbox = wrap(make_vit("augreg"), SMALL)
    with toolbox.tapped(Nothing()), pytest.raises(ConfigError, match="sites are being scored"):
        toolbox.plugs({"spatial.0": Use([0])})
    with pytest.raises(ConfigError, match=r"spatial\.9"):
        toolbox.plugs({"spatial.9": Use()})


def test_sites_are_listed_by_kind_then_layer_and_counted():
    toolbox = wrap(make_vit("augreg"), ToolboxConfig())
    assert toolbox.sites == [f"{kind}.{layer}" for kind in ("spatial", "semantic", "frequency") for layer in (0, 1)]
    c = 192
    counts = {
        "spatial": 4 * c * 64,
        "semantic": 2 * 64 * c + 64 + c,
        "frequency": 3 * (2 * c * 32 + 32 + c) + 3 * (c + 1) + 1,
    }
    assert toolbox.counts() == {site: counts[site.kind] for site in toolbox.sites}


def test_an_unknown_site_and_an_unsuitable_model_are_named():
    toolbox = wrap(make_vit("augreg"), SMALL)
    with pytest.raises(ConfigError, match=r"spatial\.9"):
        toolbox.apply(GatePlan(["spatial.9"]))
    with pytest.raises(BackboneError, match="ResNet has no list of blocks"):
        cegate.wrap(timm.create_model("resnet18", pretrained=False))
    with pytest.raises(BackboneError, match="ParallelThingsBlock"):
        wrap(timm.create_model("vit_small_patch16_18x2_224", pretrained=False, depth=1))


def test_sites_of_several_streams_serve_their_own_samples_alone(images):
    vit = make_vit("dinov2-registers")
    toolbox = Toolbox(Backbone(vit), SMALL, streams=["dsm"])
    randomise(toolbox)
    alone = Toolbox(Backbone(vit), SMALL)
    assert toolbox.sites[:4] == ["spatial.0", "spatial.0.dsm", "spatial.1", "spatial.1.dsm"]
    assert toolbox.counts()["frequency.1.dsm"] == alone.counts()["frequency.1"]
    first = ["spatial.0", "semantic.1", "frequency.0"]
    second = ["spatial.1", "semantic.0", "frequency.1", "frequency.0"]
    toolbox.apply(GatePlan([*first, *(f"{site}.dsm" for site in second)]))
    both = torch.cat([images, images.flip(0) + 1])
    with torch.no_grad():
        found, _ = toolbox.backbone.tokens_after(both, [1], Circuit(toolbox.plugs()), streams=2)
        for part, sites, stream in ((slice(0, 2), first, ""), (slice(2, 4), second, ".dsm")):
            for site in alone.sites:
                for name, parameter in alone.parameters_of(site).items():
                    parameter.copy_(toolbox.parameters_of(site + stream)[name])
            alone.apply(GatePlan(sites))
            expected, _ = alone.backbone.tokens_after(both[part], [1], Circuit(alone.plugs()))
            torch.testing.assert_close(found[0][part], expected[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="several streams"):
        toolbox.merge()
