"""Released checkpoints: the same logits under our names, and every key accounted for."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig

import cegate
from cegate import released
from cegate.cli import FAILED, GOOD, USAGE
from cegate.convert import ACCOUNT_FILE, BACKBONE_FILE, STYLE_FILE, convert_file, main, read_checkpoint
from cegate.errors import CheckpointError
from cegate.heads import mask2former
from cegate.released import convert, head_name, recognise

SIZES = {"num_attention_heads": 4, "encoder_feedforward_dim": 48, "dim_feedforward": 64}


@pytest.fixture(scope="module")
def vectors(shared):
    with np.load(shared / "vectors" / "mask2former_head_tiny.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def published_head(vectors, monkeypatch, *, rein: bool) -> mask2former.Mask2FormerHead:
    """Our head of the vectors' sizes, with their weights by their published names."""
    monkeypatch.setattr(mask2former, "Mask2FormerConfig", lambda **own: Mask2FormerConfig(**own | SIZES))
    monkeypatch.setattr(mask2former, "_pyramid", list)  # the vectors' maps are a pyramid already
    head = mask2former.Mask2FormerHead(24, 3, queries=5, width=32, encoder_layers=2, decoder_layers=4, points=8)
    state = {f"decode_head.{name[2:]}": value for name, value in vectors.items() if name.startswith("w.")}
    if rein:
        head.link_queries()
        extra = {name: value for name, value in vectors.items() if name.startswith("rein.w.")}
        state |= {f"decode_head.{name.removeprefix('rein.w.')}": value for name, value in extra.items()}
        state["backbone.reins.learnable_tokens"] = torch.zeros(1, 5, 8)
        weights = convert(state, "tiny.pth").weights
    else:
        weights = released._head(state, released.Account())
        weights["head.criterion.empty_weight"] = head.criterion.empty_weight
    own = {name.removeprefix("head."): v for name, v in weights.items() if name.startswith("head.")}
    head.load_state_dict(own)  # strict: every key has a place, every place a key
    return head.double().eval()


@pytest.mark.parametrize("rein", [False, True], ids=["plain", "token queries"])
def test_a_published_head_gives_its_logits_and_its_map(vectors, monkeypatch, rein):
    head = published_head(vectors, monkeypatch, rein=rein)
    maps = [vectors[f"feat{level}"].double() for level in range(4)]
    prefix = "rein." if rein else ""
    queries = vectors["rein.queries"].double() if rein else None
    with torch.no_grad():
        found = head.decoder(maps, queries)
        classes, masks = found.class_logits, [found.mask_logits(layer) for layer in range(len(found.class_logits))]
        shares = head(maps, (64, 96), queries).softmax(1)
    for found, name in ((classes, "cls_logits"), (torch.stack(masks), "mask_logits")):
        expected = vectors[prefix + name].double()
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    semantic = vectors[f"{prefix}semantic"].double()
    large = F.interpolate(masks[-1], size=(64, 96), mode="bilinear", align_corners=False).sigmoid()
    own = torch.einsum("bqk,bqhw->bkhw", classes[-1].softmax(-1)[..., :-1], large)
    torch.testing.assert_close(own, semantic, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares, semantic / semantic.sum(1, keepdim=True), atol=1e-5, rtol=0)


def test_queries_are_q_then_k_then_v():
    stacked = torch.arange(6.0)[:, None].expand(-1, 2)
    key = "decode_head.transformer_decoder.layers.1.self_attn.attn.in_proj_weight"
    weights = released._head({key: stacked}, released.Account())
    stem = "head.decoder.transformer.decoder.layers.1.self_attn."
    assert {name: w[:, 0].tolist() for name, w in weights.items()} == {
        f"{stem}q_proj.weight": [0, 1],
        f"{stem}k_proj.weight": [2, 3],
        f"{stem}v_proj.weight": [4, 5],
    }
    cross = "transformer_decoder.layers.1.cross_attn.attn.in_proj_bias"
    assert head_name(cross) == "decoder.transformer.decoder.layers.1.cross_attn.in_proj_bias"


# --- whole files ----------------------------------------------------------------------------------------------------

BACKBONE = "vit_tiny_patch16_224"
OPTIONS = {"backbone": BACKBONE, "crop": 32, "stride": 32, "features": [0, 3, 7, 11]}


def published_names(layers: int = 1, decoder_layers: int = 2, *, linked: bool) -> list[str]:
    """Every name of mmdet's head, from the specification."""
    both, names = ("weight", "bias"), []
    for i in range(3):
        names += [f"pixel_decoder.input_convs.{i}.{part}.{w}" for part in ("conv", "gn") for w in both]
    linear = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for i in range(layers):
        inner = [*(f"self_attn.{part}" for part in linear), "ffn.layers.0.0", "ffn.layers.1", "norms.0", "norms.1"]
        names += [f"pixel_decoder.encoder.layers.{i}.{part}.{w}" for part in inner for w in both]
    for part in ("lateral_convs.0", "output_convs.0"):
        names += [f"pixel_decoder.{part}.{end}" for end in ("conv.weight", "gn.weight", "gn.bias")]
    names += ["pixel_decoder.level_encoding.weight", *(f"pixel_decoder.mask_feature.{w}" for w in both)]
    for i in range(decoder_layers):
        stem = f"transformer_decoder.layers.{i}."
        for attention in ("self_attn", "cross_attn"):
            ends = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
            names += [f"{stem}{attention}.attn.{end}" for end in ends]
        inner = ("ffn.layers.0.0", "ffn.layers.1", "norms.0", "norms.1", "norms.2")
        names += [f"{stem}{part}.{w}" for part in inner for w in both]
    names += [f"{part}.{w}" for part in ("transformer_decoder.post_norm", "cls_embed") for w in both]
    names += [f"mask_embed.{i}.{w}" for i in (0, 2, 4) for w in both] + ["level_embed.weight"]
    return names + (
        ["querys2feat.weight", "querys2feat.bias"] if linked else ["query_embed.weight", "query_feat.weight"]
    )


@pytest.fixture(scope="module", autouse=True)
def small_heads():
    """Heads of every size have the same names."""
    small = {"queries": 100, "width": 32, "encoder_layers": 1, "decoder_layers": 3, "points": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask2former.Mask2FormerHead.__init__, "__kwdefaults__", small)
        yield


@pytest.fixture(scope="module")
def model(small_heads):
    """A small model of ours with every weight drawn, and its backbone's weights."""
    config = {
        "data": {"classes": ["a", "b", "c"], "crop": 32, "stride": 32, "source": {"bands": [1, 2, 3]}},
        "model": {
            "backbone": BACKBONE,
            "weights": "none",
            "image_size": 32,
            "patch_size": 16,
            "features": [0, 3, 7, 11],
            "head": "mask2former",
        },
        "gate": {"method": "none"},
        "refiner": {"method": "rein", "tokens": 6, "rank": 2},
    }
    torch.manual_seed(1)
    segmenter = cegate.build(config).eval()
    with torch.no_grad():
        for parameter in [*segmenter.refiner.parameters(), *segmenter.head.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return segmenter


def in_published_names(model) -> dict[str, torch.Tensor]:
    head = model.head.state_dict()
    state = {}
    for name in published_names(linked=True):
        ours = head_name(name)
        if "self_attn.in_proj_" in ours:
            stem, end = ours.split("in_proj_")
            state[f"decode_head.{name}"] = torch.cat([head[f"{stem}{p}_proj.{end}"] for p in "qkv"])
        else:
            state[f"decode_head.{name}"] = head[ours]
    published = {ours: theirs for theirs, ours in released._REIN.items()}
    for name, value in model.refiner.state_dict().items():
        module, dot, rest = name.partition(".")
        state[f"backbone.reins.{published[module]}{dot}{rest}"] = value
    return state


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    torch.save(in_published_names(model), folder / "rein.pth")
    backbone = {name: value for name, value in model.vit.state_dict().items() if not name.startswith("head.")}
    torch.save(backbone, folder / "dinov2_converted.pth")
    return folder


def same_logits(model, folder) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(cegate.load(folder, device="cpu")(images), model(images), atol=1e-5, rtol=1e-5)


def test_a_rein_checkpoint_becomes_an_adapter_with_its_logits(model, files, tmp_path, capsys):
    command = ["rein.pth", "--out", "adapter", "--weights", "dinov2_converted.pth", "--classes", "a, b, c"]
    command = [str(files / part) if part.endswith(".pth") else part for part in command]
    command[2] = str(tmp_path / "adapter")
    sizes = ["--backbone", BACKBONE, "--crop", "32", "--stride", "32", "--features", "0,3,7,11"]
    assert main([*command, *sizes]) == GOOD
    out = capsys.readouterr().out
    assert "Rein or CrossEarth, 12 layers of width 192, 3 classes" in out and "filled 2 weights" in out
    same_logits(model, tmp_path / "adapter")
    account = json.loads((tmp_path / "adapter" / ACCOUNT_FILE).read_text())
    assert set(account["used"]) == set(torch.load(files / "rein.pth", weights_only=True))
    assert not account["left"] and not account["missing"] and not account["unknown"]


def test_an_unstripped_checkpoint_is_used_as_far_as_it_fits(model, files, tmp_path):
    """Backbone, decoder of masked images, mask token, style networks, logs and optimiser beside what is needed."""
    from cegate.style.networks import StyleNetworks, load_style

    state = in_published_names(model)
    state |= {f"backbone.{k}": v for k, v in torch.load(files / "dinov2_converted.pth", weights_only=True).items()}
    style = StyleNetworks().state_dict()
    for key, value in style.items():
        ours, _, rest = key.partition(".")
        state[f"augmentor.{ {'predictor': 'stylePredictor', 'transfer': 'ghiasi'}[ours] }.{rest}"] = value
    state |= {
        "task_head.conv.weight": torch.zeros(1),
        "mask_token": torch.zeros(1),
        "backbone.mask_token": torch.zeros(1),
    }
    log = types.ModuleType("mmengine_like")
    log.HistoryBuffer = type("HistoryBuffer", (), {"__module__": "mmengine_like", "__qualname__": "HistoryBuffer"})
    sys.modules["mmengine_like"] = log
    buffer = log.HistoryBuffer()
    buffer.values = np.arange(3.0)
    meta = {"dataset_meta": {"classes": ("x", "y", "z"), "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 16]]}}
    torch.save({"meta": meta, "state_dict": state, "message_hub": {"loss": buffer}}, tmp_path / "iter.pth")
    del sys.modules["mmengine_like"]  # so that looking it up would fail
    lines = convert_file(tmp_path / "iter.pth", tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / BACKBONE_FILE).is_file()
    loaded = cegate.load(tmp_path / "out", device="cpu")
    assert loaded.classes == ("x", "y", "z") and loaded.recipe.palette == ("#FF0000", "#00FF00", "#000010")
    same_logits(model, tmp_path / "out")
    text = "\n".join(lines)
    assert "task_head.conv: restores masked images" in text and "style networks, in training only" in text
    again = load_style(tmp_path / "out" / STYLE_FILE).state_dict()
    assert all(torch.equal(again[key], value) for key, value in style.items())


def test_full_tokens_are_a_product_too(model, files):
    state = in_published_names(model)
    a, b = state.pop("backbone.reins.learnable_tokens_a"), state.pop("backbone.reins.learnable_tokens_b")
    state["backbone.reins.learnable_tokens"] = a @ b
    weights = convert(state, "full.pth").weights
    torch.testing.assert_close(weights["refiner.token_a"] @ weights["refiner.token_b"], a @ b)


# --- Earth-Adapter --------------------------------------------------------------------------------------------------


def earth_adapter(depth: int = 12, width: int = 192, dim: int = 4) -> dict[str, torch.Tensor]:
    state = {"backbone.refine_feat.scale": torch.linspace(0.1, 0.4, depth)}
    for layer in range(depth):
        for expert in (1, 2, 3):
            stem = f"backbone.refine_feat.mlp_list{expert}.{layer}."
            state |= {f"{stem}0.weight": torch.randn(dim, width) / 8, f"{stem}0.bias": torch.randn(dim)}
            state |= {f"{stem}2.weight": torch.randn(width, dim) / 8, f"{stem}2.bias": torch.randn(width)}
        stem = f"backbone.refine_feat.router.{layer}."
        state |= {f"{stem}weight": torch.randn(3, width) / 8, f"{stem}bias": torch.randn(3)}
        state |= {f"backbone.refine_feat.layer_norm.{layer}.{w}": torch.ones(width) for w in ("weight", "bias")}
    return state


def published_mixture(state, layer: int, y: torch.Tensor, grid: tuple[int, int], *, mixed: bool) -> torch.Tensor:
    """What Earth-Adapter does at a layer, with an FFT, in float64."""
    w = {k.removeprefix("backbone.refine_feat."): v.double() for k, v in state.items()}

    def expert(n: int, t: torch.Tensor) -> torch.Tensor:
        stem = f"mlp_list{n}.{layer}."
        hidden = (t @ w[f"{stem}0.weight"].T + w[f"{stem}0.bias"]).clamp(min=0)
        return hidden @ w[f"{stem}2.weight"].T + w[f"{stem}2.bias"]

    if not mixed:
        return y + w["scale"][layer] * expert(1, y)
    planes = y.mT.unflatten(2, grid)
    spectrum = torch.fft.fftshift(torch.fft.fft2(planes, norm="ortho"), dim=(-2, -1))
    c = int(min(grid) * 0.3 // 2)
    keep = torch.zeros(grid)
    keep[grid[0] // 2 - c : grid[0] // 2 + c, grid[1] // 2 - c : grid[1] // 2 + c] = 1
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1)), norm="ortho").real.flatten(2).mT
    share = (y @ w[f"router.{layer}.weight"].T + w[f"router.{layer}.bias"]).softmax(-1)
    parts = torch.stack([expert(1, y), expert(2, low), expert(3, y - low)], -1)
    return y + w["scale"][layer] * (parts * share[:, :, None]).sum(-1)


@pytest.mark.parametrize("layer", [0, 11])
def test_an_earth_adapter_layer_is_the_published_one(layer):
    from cegate import ops

    state = earth_adapter()
    found = convert(state, "ea.pth", fft_layers=[9, 10, 11])
    site = {k.rpartition(".")[2]: v.double() for k, v in found.weights.items() if f"frequency.{layer}." in k}
    y, names = (
        torch.randn(2, 64, 192).double(),
        ("down", "down_bias", "up", "up_bias", "router", "router_bias", "scale"),
    )
    ours = ops.frequency_adapter(y, (8, 8), *(site[name] for name in names), cutoff=0.3, band="official")
    expected = published_mixture(state, layer, y, (8, 8), mixed=layer == 11)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def test_an_earth_adapter_checkpoint_holds_its_backbone(model, files, tmp_path):
    state = earth_adapter()
    state |= {f"backbone.{k}": v for k, v in torch.load(files / "dinov2_converted.pth", weights_only=True).items()}
    head = {k: v for k, v in in_published_names(model).items() if "decode_head" in k and "querys2feat" not in k}
    state |= head | {f"decode_head.{name}.weight": torch.randn(100, 32) for name in ("query_embed", "query_feat")}
    torch.save({"state_dict": state}, tmp_path / "ea.pth")
    convert_file(tmp_path / "ea.pth", tmp_path / "out", **OPTIONS, fft_layers=[11])
    loaded = cegate.load(tmp_path / "out", device="cpu")
    assert len(loaded.toolbox.plan.on) == 12 and loaded.config.toolbox.frequency.width == 4
    assert loaded(torch.randn(2, 3, 32, 32)).isfinite().all()
    account = json.loads((tmp_path / "out" / ACCOUNT_FILE).read_text())
    assert account["left"]["backbone.refine_feat.layer_norm.3.weight"] == "never used by the published code"
    assert set(account["used"]) | set(account["left"]) == set(state)


def test_which_layers_mix_must_be_said():
    with pytest.raises(CheckpointError, match=r"which of its 12 layers mix .* give --fft_layers as fft_layer of"):
        convert(earth_adapter(), "ea.pth")
    with pytest.raises(CheckpointError, match=r"--fft_layers \[24\] are not all among the layers 0..11 of ea.pth"):
        convert(earth_adapter(), "ea.pth", fft_layers=[24])


# --- backbones ------------------------------------------------------------------------------------------------------


def test_a_backbone_is_resampled_plainly(shared, tmp_path):
    with np.load(shared / "vectors" / "dinov2_resample_plain.npz") as file:
        vectors = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    state = {"patch_embed.proj.weight": vectors["patch_before"], "pos_embed": vectors["pos_before"]}
    state |= {"blocks.0.attn.qkv.weight": torch.ones(2, 2), "mask_token": torch.zeros(1, 4)}
    torch.save(state, tmp_path / "dinov2.pth")
    lines = convert_file(tmp_path / "dinov2.pth", tmp_path / "b.safetensors")
    found, _ = read_checkpoint(tmp_path / "b.safetensors")
    torch.testing.assert_close(found["pos_embed"], vectors["pos_after"], atol=2e-6, rtol=0)
    torch.testing.assert_close(found["patch_embed.proj.weight"], vectors["patch_after"], atol=2e-6, rtol=0)
    assert "mask_token" not in found and "model.weights" in lines[-1]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name", "message"),
    [
        (["backbone.blocks.0.attn.sampling_offsets.2.weight"], "x.pth", r"another backbone, RVSA \(MTP\)"),
        (["backbone.reins.scale"], "D2M-MTP.pth", r"D2M-MTP.pth cannot be converted: it has another backbone, RVSA"),
        (["image_encoder.blocks.0.attn.qkv.weight"], "sam.pth", "it holds a SAM encoder"),
        (["toolbox.spatial.0.down_q"], "a.pth", "weights of cegate itself"),
        (["backbone.layer1.0.conv1.weight"], "r.pth", "no plain vision transformer"),
        (["decode_head.conv_seg.weight"], "h.pth", r"its keys are decode_head.conv_seg; expected a checkpoint of Rein"),
    ],
)
def test_other_kinds_are_refused_by_name(keys, name, message):
    with pytest.raises(CheckpointError, match=message):
        recognise(dict.fromkeys(keys, torch.zeros(1)), f"/somewhere/{name}")


def test_keys_without_a_place_are_named_and_can_be_left(model):
    state = in_published_names(model) | {"decode_head.strange.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"no part known here has decode_head.strange \(first: decode_head.strange.w"
    ):
        convert(state, "s.pth")
    assert "decode_head.strange.weight" in convert(state, "s.pth", leave=["decode_head.strange"]).account.left


@pytest.mark.parametrize("key", ["decode_head.cls_embed.weight", "backbone.reins.mlp_delta_f.bias"])
def test_missing_keys_are_named(model, files, tmp_path, key):
    state = in_published_names(model)
    del state[key]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m.pth does not fit the model: missing (head|refiner)"):
        convert_file(tmp_path / "m.pth", tmp_path / "out", weights=files / "dinov2_converted.pth", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_head_with_contents_of_its_own_does_not_fit(model):
    state = {k: v for k, v in in_published_names(model).items() if "querys2feat" not in k}
    with pytest.raises(CheckpointError, match=r"querys2feat is missing, and query_feat is there"):
        convert(state | {"decode_head.query_feat.weight": torch.zeros(6, 32)}, "own.pth")


def test_a_checkpoint_of_another_backbone_says_so(model, files, tmp_path):
    with pytest.raises(CheckpointError, match=r"12 layers of width 192, which is no DINOv2; give --backbone NAME"):
        convert_file(files / "rein.pth", tmp_path / "a", weights=files / "dinov2_converted.pth", crop=32, stride=32)
    with pytest.raises(CheckpointError, match=r"holds no backbone; give the one it belongs to with --weights FILE"):
        convert_file(files / "rein.pth", tmp_path / "a", **OPTIONS)
    small = {"backbone": "vit_small_patch16_224", "weights": "none", "image_size": 32}
    small = cegate.build({"model": small, "data": {"classes": ["a", "b"], "crop": 32}})
    torch.save(small.vit.state_dict(), tmp_path / "small.pth")
    message = r"rein.pth was trained on 12 layers of width 192, but vit_small_patch16_224 has 12 of width 384; give the"
    other = OPTIONS | {"backbone": "vit_small_patch16_224", "weights": tmp_path / "small.pth"}
    with pytest.raises(CheckpointError, match=message):
        convert_file(files / "rein.pth", tmp_path / "a", **other)


class Bomb:
    def __reduce__(self):
        return (print, ("it ran",))


def test_nothing_in_a_file_runs(tmp_path, capsys):
    torch.save({"state_dict": {"backbone.reins.scale": torch.zeros(1)}, "meta": Bomb()}, tmp_path / "bomb.pth")
    state, _ = read_checkpoint(tmp_path / "bomb.pth")
    assert list(state) == ["backbone.reins.scale"]
    torch.save({"model": nn.Conv2d(1, 1, 1)}, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"whole.pth holds no weights by name"):
        read_checkpoint(tmp_path / "whole.pth")
    assert "it ran" not in capsys.readouterr().out


def test_the_command_says_what_is_wrong_in_a_line(files, tmp_path, capsys):
    assert main([str(tmp_path / "none.pth"), "--out", str(tmp_path / "a")]) == FAILED
    assert "none.pth; give a .pth or .safetensors file" in capsys.readouterr().err
    assert main([str(files / "rein.pth")]) == USAGE
    assert main([str(files / "rein.pth"), "--out", str(tmp_path / "a"), "--crop", "x"]) == USAGE
    assert main([str(files / "rein.pth"), "--out", str(files)]) == FAILED
    assert "is there already; give another --out" in capsys.readouterr().err
