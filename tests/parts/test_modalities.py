"""MMAdapter and MMLoRA: the published modules' numbers, and what they promise on any backbone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from cegate.backbone import sam
from cegate.backbone.backbone import FAMILIES, Backbone
from cegate.backbone.ports import Circuit, Ports, Tokens
from cegate.backbone.stream import Stream
from cegate.convert_mfnet import convert_weights
from cegate.errors import ConfigError
from cegate.parts.mm_adapter import MMAdapter
from cegate.parts.mm_lora import MMLoRA
from cegate.parts.streams import Streams, choose_lost, lose_modality

PARTS = {"mmadapter": MMAdapter, "mmlora": MMLoRA}
both = pytest.mark.parametrize("kind", PARTS)
WIDTH = 32


@pytest.fixture(autouse=True)
def _known_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, VisionTransformerSAM, sam.Sam())


def read_vector(shared, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    stored = np.load(shared / "vectors" / f"{name}.npz")
    return {k: torch.as_tensor(stored[k]).to(dtype if stored[k].dtype.kind == "f" else torch.int64) for k in stored}


def named(vector, prefix: str):
    return convert_weights({k.removeprefix(prefix): v for k, v in vector.items() if k.startswith(prefix)}).weights


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def small_sam(dtype, window: int, global_blocks, depth: int, eps: float = 1e-6) -> VisionTransformerSAM:
    return VisionTransformerSAM(
        img_size=1024,
        num_classes=0,
        embed_dim=WIDTH,
        depth=depth,
        num_heads=4,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=tuple(global_blocks),
        neck_chans=16,
        norm_layer=partial(nn.LayerNorm, eps=eps),
    ).to(dtype)


def small_vit(depth: int = 2) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=32, patch_size=8, num_classes=0, global_pool="", embed_dim=WIDTH, depth=depth, num_heads=4
    )
    return vit.double().eval().requires_grad_(False)


def changed(part: nn.Module) -> nn.Module:
    for weight in part.parameters():
        nn.init.normal_(weight, std=0.3)
    return part.double()


# parity --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_encoder_of_two_modalities_is_the_published_one(kind, dtype, shared):
    vector = read_vector(shared, f"mfnet_encoder_tiny_{kind}", dtype)
    weights, grads = named(vector, "w."), named(vector, "g.")
    vit = small_sam(dtype, int(vector["window"]), vector["global_blocks"].tolist(), 4)
    vit.load_state_dict(weights["vit"], strict=True)
    vit.requires_grad_(False)
    part = PARTS[kind](4, WIDTH).to(dtype)
    part.load_state_dict(weights["modal"], strict=True)

    image, dsm = (vector[name].clone().requires_grad_() for name in ("image", "dsm"))
    batch = torch.cat([image, dsm[:, None].expand(-1, 3, -1, -1)])
    maps = Backbone(vit).run(batch, range(4), Circuit(part.plugs()), streams=2).maps
    for n, both_maps in enumerate(maps):
        for stream, ours in zip("xy", both_maps.chunk(2), strict=True):
            assert_close(ours.permute(0, 2, 3, 1), vector[f"block{n}_{stream}"])
    x, y = sam.Sam().finish(vit, maps[-1]).chunk(2)
    assert_close(x, vector["F_x"])
    assert_close(y, vector["F_y"])

    ((x * vector["probe_x"]).sum() + (y * vector["probe_y"]).sum()).backward()
    assert_close(image.grad, vector["d_image"])
    assert_close(dsm.grad, vector["d_dsm"])
    assert grads["modal"].keys() == dict(part.named_parameters()).keys()
    for name, weight in part.named_parameters():
        # a scalar's gradient is a small difference of large sums, in float32
        tolerance = 1e-4 if name.endswith("mix") and dtype == torch.float32 else 1e-5
        assert_close(weight.grad, grads["modal"][name], tolerance)


@both
def test_block_of_two_modalities_is_the_published_one(kind, shared):
    vector = read_vector(shared, f"mfnet_{kind}_block", torch.float64)
    flat = {f"{prefix}.blocks.0.{k[2:]}": v for k, v in vector.items() for prefix in "wg" if k.startswith(f"{prefix}.")}
    weights, grads = named(flat, "w."), named(flat, "g.")
    vit = small_sam(torch.float64, int(vector["window"]), (), 1, eps=1e-5)
    vit.load_state_dict(weights["vit"], strict=False)
    vit.requires_grad_(False)
    part = PARTS[kind](1, WIDTH).double()
    part.load_state_dict(weights["modal"], strict=True)

    x, y = (vector[name].clone().requires_grad_() for name in "xy")
    grid, program = tuple(x.shape[1:3]), sam.Sam()
    block = vit.blocks[0]
    tables = block.attn.rel_pos_h, block.attn.rel_pos_w
    places = [sam.find_places(*tables, grid, block.window_size)]
    ports = Circuit(part.plugs()).at(0)
    tokens = torch.cat([x, y]).flatten(1, 2)
    out = program.run(program.form(block, ""), block, 0, Stream(tokens), places, ports, Tokens(0, grid, 2))
    out_x, out_y = out.total().unflatten(1, grid).chunk(2)
    assert_close(out_x, vector["out_x"])
    assert_close(out_y, vector["out_y"])
    ((out_x * vector["probe_x"]).sum() + (out_y * vector["probe_y"]).sum()).backward()
    assert_close(x.grad, vector["dx"])
    assert_close(y.grad, vector["dy"])
    for name, weight in part.named_parameters():
        if name in grads["modal"]:
            assert_close(weight.grad, grads["modal"][name])


# what they promise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "width", "adapter", "lora"), [(12, 768, 14.20, 1_032_240), (24, 1024, 50.45, 2_752_608)]
)
def test_parameter_counts_are_the_papers(depth, width, adapter, lora):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in part(depth, width).parameters()) for part in (MMAdapter, MMLoRA)]
    inner = width // 4
    assert counts[0] == depth * (4 * (2 * width * inner + inner + width) + 2)
    assert counts[0] == pytest.approx(adapter * 1e6, rel=1e-3)
    assert counts[1] == lora


def run_two(vit, part, x, y):
    """Both streams behind the last block."""
    return Backbone(vit).run(torch.cat([x, y]), [1], Circuit(part.plugs()), streams=2).maps[0].chunk(2)


@pytest.mark.parametrize("part", [MMLoRA(2, WIDTH), MMAdapter(2, WIDTH, zero_init=True)], ids=["mmlora", "mmadapter"])
def test_at_the_start_both_streams_are_the_frozen_backbone(part):
    vit, (x, y) = small_vit(), torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    backbone = Backbone(vit)
    for ours, images in zip(run_two(vit, part.double(), x, y), (x, y), strict=True):
        torch.testing.assert_close(ours, backbone.run(images, [1]).maps[0], rtol=0, atol=1e-12)


@both
def test_exchange_is_what_the_mix_says(kind):
    """With all of its own share a stream does not know the other; with less it does."""
    vit, part = small_vit(), changed(PARTS[kind](2, WIDTH))
    x, y, other = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    mixes = [weight for name, weight in part.named_parameters() if name.endswith("mix")]
    for mix in mixes:
        mix.data = torch.tensor([1.0, 0.3], dtype=torch.float64)
    (x_y, y_x), (x_o, o_x) = run_two(vit, part, x, y), run_two(vit, part, x, other)
    torch.testing.assert_close(x_y, x_o)
    assert not torch.allclose(y_x, o_x)
    assert not torch.allclose(y_x, run_two(vit, part, other, y)[1])


@both
def test_swapped_modalities_and_weights_swap_what_comes_out(kind):
    vit, part = small_vit(), changed(PARTS[kind](2, WIDTH))
    x, y = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    out = run_two(vit, part, x, y)
    for weight in part.parameters():
        weight.data = weight.data.flip(0)
    for ours, swapped in zip(out, run_two(vit, part, y, x)[::-1], strict=True):
        torch.testing.assert_close(ours, swapped)


@both
def test_without_exchange_streams_do_not_know_of_each_other(kind):
    vit, part = small_vit(), changed(PARTS[kind](2, WIDTH, exchange=False))
    x, y, other = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(run_two(vit, part, x, y)[0], run_two(vit, part, x, other)[0])
    ports = {plug.port for plug in part.plugs()}
    assert ports == ({"attention"} if kind == "mmadapter" else {"qkv", "fc1", "fc2"})


def test_single_modality_is_the_standard_adapter():
    """Written out: a + f(a) after attention, y + 0.5 g(h) beside the MLP."""
    part = changed(MMAdapter(1, WIDTH, streams=1))
    a, x1, h, y = torch.randn(4, 2, 5, WIDTH, dtype=torch.float64)
    ports, tokens = Circuit(part.plugs()).at(0), Tokens(1, (2, 2))

    def bottleneck(z, layer):
        hidden = nn.functional.gelu(z @ layer.down[0].T + layer.down_bias[0])
        return hidden @ layer.up[0].T + layer.up_bias[0]

    layer = part.layers[0]
    torch.testing.assert_close(ports.attention[0](a, tokens), a + bottleneck(a, layer.attention))
    torch.testing.assert_close(ports.mlp[0](x1, h, y, tokens), y + 0.5 * bottleneck(h, layer.mlp))


def test_single_modality_is_the_standard_lora():
    part = changed(MMLoRA(1, WIDTH, streams=1, rank=4, alpha=1.0))
    tokens, layer = Tokens(1, (2, 2)), part.layers[0]
    ports: Ports = Circuit(part.plugs()).at(0)
    u, f = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 5, 4 * WIDTH, dtype=torch.float64)
    qkv = torch.randn(2, 5, 3 * WIDTH, dtype=torch.float64)

    def update(u, low):
        return 0.25 * u @ (low.up[0] @ low.down[0]).T

    q, k, v = ports.qkv[0](u, qkv, tokens).chunk(3, -1)
    torch.testing.assert_close(q, qkv[..., :WIDTH] + update(u, layer.query))
    assert torch.equal(k, qkv[..., WIDTH : 2 * WIDTH])
    torch.testing.assert_close(v, qkv[..., 2 * WIDTH :] + update(u, layer.value))
    torch.testing.assert_close(ports.fc1[0](u, f, tokens), f + update(u, layer.fc1))
    torch.testing.assert_close(ports.fc2[0](f, u, tokens), u + update(f, layer.fc2))
    separate = ports.qkv[0](u, qkv.chunk(3, -1), tokens)
    for ours, fused in zip(separate, (q, k, v), strict=True):
        torch.testing.assert_close(ours, fused)


@both
@pytest.mark.parametrize("name", ["dinov2", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"])
def test_other_backbones_take_two_modalities_too(kind, name):
    """DINOv2 with register tokens, DINOv3 with rotary positions and gated MLPs: nothing is SAM's own."""
    small = {"embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 0, "img_size": 32}
    if name == "dinov2":
        vit = VisionTransformer(patch_size=16, reg_tokens=4, init_values=1e-5, **small)
    else:
        vit = timm.create_model(name, **small)
    backbone = Backbone(vit.eval())
    part = PARTS[kind].build(backbone)
    for weight in part.parameters():
        nn.init.normal_(weight)
    images, circuit = torch.randn(4, 3, 32, 32), Circuit(part.plugs())
    maps = backbone.run(images, [0, 1], circuit, streams=2).maps
    plain = backbone.run(images, [0, 1]).maps
    assert [m.shape for m in maps] == [m.shape for m in plain]
    with torch.no_grad():  # another way through
        torch.testing.assert_close(backbone.run(images, [0, 1], circuit, streams=2).maps, maps)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone.run(images, [0, 1], circuit, streams=2).maps
        with torch.no_grad():
            torch.testing.assert_close(backbone.run(images, [0, 1], circuit, streams=2).maps, half)
    maps[-1].square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in part.parameters())


@both
def test_only_the_part_learns(kind):
    vit, part = small_vit(), changed(PARTS[kind](2, WIDTH))
    x, y = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    sum(m.square().sum() for m in run_two(vit, part, x, y)).backward()
    assert all(w.grad is None for w in vit.parameters())
    assert all(w.grad.isfinite().all() for w in part.parameters())


# streams -------------------------------------------------------------------------------------------------------------


def test_modalities_come_to_lie_behind_each_other():
    images = torch.randn(2, 6, 4, 4)
    batch = Streams(("colour", "sar", "dsm"), (3, 2, 1))(images)
    colour, sar, dsm = batch.chunk(3)
    assert torch.equal(colour, images[:, :3])
    assert torch.equal(sar[:, :2], images[:, 3:5])
    torch.testing.assert_close(sar[:, 2], images[:, 3:5].mean(1))
    assert all(torch.equal(dsm[:, c], images[:, 5]) for c in range(3))


def test_what_is_not_known_becomes_a_learned_value():
    images = torch.randn(2, 4, 4, 4)
    images[0, 3, 1:, :2] = torch.nan
    streams = Streams(("colour", "dsm"), (3, 1))
    nn.init.constant_(streams.absent, 7.0)
    batch = streams(images)
    assert batch.isfinite().all()
    assert (batch[2, :, 1:, :2] == 7).all() and (batch == 7).sum() == 18
    batch.sum().backward()
    assert streams.absent.grad.tolist() == [0, 0, 0, 18]


def test_a_lost_modality_is_unknown_in_its_sample_alone():
    images = torch.randn(3, 4, 2, 2)
    lost = lose_modality(images, (3, 1), torch.tensor([-1, 0, 1]))
    assert torch.equal(lost[0], images[0])
    assert lost[1, :3].isnan().all() and torch.equal(lost[1, 3], images[1, 3])
    assert lost[2, 3].isnan().all() and torch.equal(lost[2, :3], images[2, :3])


def test_modalities_are_lost_as_often_as_asked():
    uniform = (torch.arange(1000) + 0.5) / 1000
    lost = choose_lost(uniform, 0.3)
    assert [(lost == n).sum().item() for n in (-1, 0, 1)] == [700, 150, 150]
    assert (choose_lost(uniform, 0.0) == -1).all()
    assert set(choose_lost(uniform, 1.0).tolist()) == {0, 1}


def test_more_bands_than_the_backbone_takes_are_refused():
    with pytest.raises(
        ConfigError, match="modality s2 has 13 bands and the backbone takes 1 to 3; choose some by bands"
    ):
        Streams(("s2", "dsm"), (13, 1))
