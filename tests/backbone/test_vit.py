from __future__ import annotations

import socket
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from cegate.backbone import hub
from cegate.backbone.backbone import Backbone
from cegate.backbone.vit import build_vit, feature_layers, tiny_vit, weight_hash
from cegate.errors import BackboneError


def test_tiny_has_no_gradient_and_runs_at_other_sizes():
    vit = build_vit("tiny", weights="none", image_size=32)
    assert not vit.training
    assert not any(p.requires_grad for p in vit.parameters())
    maps = Backbone(vit).run(torch.randn(2, 3, 24, 40), [0, 2, 4, 7]).maps
    assert [tuple(m.shape) for m in maps] == [(2, 128, 3, 5)] * 4


def test_random_weights_are_said_aloud(caplog):
    build_vit("tiny", weights="none", image_size=32)
    assert "RANDOM" in caplog.text


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "samvit_base_patch16"])
def test_a_hub_out_of_reach_is_said_within_seconds(name, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")  # where nobody listens any more
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(
        BackboneError, match=rf"weights of {name} cannot be had .*no connection to 127\.0\.0\.1 .*--weights FILE"
    ) as error:
        build_vit(name, image_size=32)
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_or_a_proxy_is_left_to_its_client(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub.quick_hub() as absence:
            assert not absence and not constants.HF_HUB_OFFLINE
    with hub.quick_hub() as absence:
        assert "no connection" in absence and constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    with hub.quick_hub() as absence:
        assert not absence and not constants.HF_HUB_OFFLINE


def test_default_features_are_the_papers_layers():
    assert feature_layers(24, None) == [7, 11, 15, 23]
    assert feature_layers(12, None) == [3, 5, 7, 11]


@pytest.mark.parametrize("layers", [[1, 2, 3], [0, 1, 2, 12], [3, 2, 1, 0], [0, 0, 1, 2], [-1, 0, 1, 2]])
def test_features_that_do_not_fit_are_named(layers):
    with pytest.raises(BackboneError, match=r"model\.features=.*0\.\.11"):
        feature_layers(12, layers)


def test_dinov2_large_runs_at_patch_16_and_512_pixels_with_resampled_embeddings(tmp_path):
    """The paper's backbone; patch embedding and position grid of the 14-pixel, 518-pixel file are resampled."""
    options = {"pretrained": False, "num_classes": 0, "depth": 2, "embed_dim": 64, "num_heads": 2}
    original = timm.create_model("vit_large_patch14_dinov2", img_size=518, **options)
    save_file(original.state_dict(), tmp_path / "dinov2.safetensors")
    narrow = timm.create_model(
        "vit_large_patch14_dinov2", img_size=512, patch_size=16, dynamic_img_size=True, **options
    )
    from cegate.backbone.vit import load_weights

    load_weights(narrow, tmp_path / "dinov2.safetensors")
    assert narrow.patch_embed.proj.weight.shape[-1] == 16
    assert narrow.pos_embed.shape[1] == 1 + 32 * 32
    assert torch.equal(narrow.blocks[1].mlp.fc1.weight, original.blocks[1].mlp.fc1.weight)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 16, 16), 518, mode="bicubic")
    finer = torch.nn.functional.interpolate(smooth, 512, mode="bicubic")
    # a smooth image looks alike at both resolutions: the kernels were resampled, not cut
    a = original.eval().patch_embed(smooth).reshape(1, 37, 37, -1).mean((1, 2))
    b = narrow.eval().patch_embed(finer).reshape(1, 32 * 32, -1).mean(1)
    assert torch.nn.functional.cosine_similarity(a, b) > 0.95


def test_weights_from_a_file_are_loaded_and_hashed(tmp_path):
    source = tiny_vit(32)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build_vit("tiny", weights=str(tmp_path / "w.safetensors"), image_size=32)
    assert weight_hash(loaded) == weight_hash(source)
    with torch.no_grad():
        source.blocks[3].mlp.fc1.bias[0] += 1e-3
    assert weight_hash(loaded) != weight_hash(source)


def test_position_embeddings_are_resampled_from_a_file(tmp_path):
    save_file(tiny_vit(64).state_dict(), tmp_path / "w.safetensors")
    assert build_vit("tiny", weights=str(tmp_path / "w.safetensors"), image_size=32).pos_embed.shape[1] == 16


def test_a_fourth_band_adapts_the_patch_embedding(tmp_path):
    save_file(tiny_vit(32).state_dict(), tmp_path / "w.safetensors")
    vit = build_vit("tiny", weights=str(tmp_path / "w.safetensors"), image_size=32, in_chans=4)
    assert vit.patch_embed.proj.weight.shape[1] == 4


def test_misfits_of_a_weight_file_are_named(tmp_path):
    state = tiny_vit(32).state_dict()
    state["blocks.0.extra"] = state.pop("blocks.0.attn.qkv.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"missing: blocks\.0\.attn\.qkv\.weight; unexpected: blocks\.0\.extra"):
        build_vit("tiny", weights=str(tmp_path / "w.safetensors"), image_size=32)


def test_a_missing_or_unreadable_weight_file_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"nowhere\.pth does not exist"):
        build_vit("tiny", weights="nowhere.pth", image_size=32)
    with pytest.raises(BackboneError, match=r"model\.weights=.* is no file; give a \.pth"):
        build_vit("tiny", weights=str(tmp_path), image_size=32)
    for name in ("bad.pth", "bad.py"):
        (tmp_path / name).write_text("import no_weights\n")
        with pytest.raises(BackboneError, match=rf"{name} is no weight file .*\(\w+Error\); give a \.pth") as error:
            build_vit("tiny", weights=str(tmp_path / name), image_size=32)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [{}, {"class_token": True}], ids=["width", "width and tokens"])
def test_weights_of_another_model_are_one_line_that_says_what_differs(tmp_path, tokens):
    other = {"global_pool": "", "num_classes": 0, "embed_dim": 96, "depth": 8, "num_heads": 4, "class_token": False}
    source = timm.models.VisionTransformer(img_size=48, patch_size=8, **(other | tokens))
    save_file(source.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BackboneError) as error:
        build_vit("tiny", weights=str(tmp_path / "other.safetensors"), image_size=32)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'other.safetensors'} does not fit the backbone tiny (") and "\n" not in line
    assert "[96] for [128]" in line and "check model.backbone" in line


class _Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.tar", "w"])
def test_a_pickle_in_a_weight_file_never_runs(tmp_path, name):
    torch.save({"pos_embed": _Runs(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(BackboneError, match="a pickled object is never run"):
        build_vit("tiny", weights=str(tmp_path / name), image_size=32)
    assert not (tmp_path / "ran").exists()


def test_a_file_of_other_things_than_weights_is_named(tmp_path):
    torch.save({"stage": "after", "patch_embed.proj.weight": "none"}, tmp_path / "last.pt")
    with pytest.raises(BackboneError, match=r"last\.pt does not fit the backbone tiny \(missing: blocks"):
        build_vit("tiny", weights=str(tmp_path / "last.pt"), image_size=32)


def test_an_unknown_backbone_gets_the_nearest_name():
    with pytest.raises(BackboneError, match="did you mean 'vit_tiny_patch16_224'"):
        build_vit("vit_tiny_patch16_22", weights="none", image_size=32)
    with pytest.raises(BackboneError, match="did you mean 'tiny'"):
        build_vit("tinny", weights="none", image_size=32)
    with pytest.raises(BackboneError, match="did you mean 'vit_large_patch14_dinov2' or 'vit_large_patch14_reg4_dinov"):
        build_vit("dinov2_large", weights="none", image_size=32)


def test_an_unsuitable_size_is_an_error_of_one_line():
    with pytest.raises(BackboneError, match="cannot build beit_base_patch16_224") as error:
        build_vit("beit_base_patch16_224", weights="none", image_size=40, patch_size=14.5)
    assert "\n" not in str(error.value)


def test_real_weights_load_at_another_size(shared):
    path = shared / "weights" / "vit_tiny_patch16_224_in1k.pth"
    vit = build_vit("vit_tiny_patch16_224", weights=str(path), image_size=128)
    assert vit.pos_embed.shape == (1, 65, 192)
