from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cegate
from cegate import convert
from cegate import convert_mfnet as convert_mfnet_module
from cegate.backbone import vit
from cegate.backbone.backbone import Backbone
from cegate.convert_mfnet import convert_mfnet
from cegate.errors import CheckpointError
from cegate.heads.unetformer import UNetFormerHead
from cegate.necks.dfm import DFM
from cegate.parts.mm_adapter import MMAdapter
from cegate.parts.mm_lora import MMLoRA


def users_checkpoint(shared, kind: str) -> dict[str, torch.Tensor]:
    """Encoder twice, prompt encoder, pyramids and decoder, as the published code saves them."""
    encoder, rest = (np.load(shared / "vectors" / f"mfnet_{n}.npz") for n in (f"encoder_tiny_{kind}", "pyramid"))
    weights = {k[2:]: torch.as_tensor(encoder[k]) for k in encoder if k.startswith("w.")}
    state = {f"{prefix}image_encoder.{k}": v for prefix in ("sam.", "") for k, v in weights.items()}
    state |= {k[2:]: torch.as_tensor(rest[k]) for k in rest if k.startswith("w.")}
    state["sam.prompt_encoder.not_a_point_embed.weight"] = torch.zeros(1, 4)
    state["decoder.b4.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.int64)
    state["decoder.b4.norm1.num_batches_tracked"] = torch.tensor(7)
    return state


@pytest.mark.parametrize("kind", ["mmadapter", "mmlora"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_users_checkpoint_fits_the_parts_strictly(kind, wrapped, shared):
    state = users_checkpoint(shared, kind)
    given = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 49} if wrapped else state
    found = convert_mfnet(given)
    assert (found.depth, found.width, found.classes) == (4, 32, 3)
    assert found.bottleneck == (8 if kind == "mmadapter" else 4)
    assert found.official_norm and not found.official_relpos
    part = MMAdapter(4, 32) if kind == "mmadapter" else MMLoRA(4, 32)
    part.load_state_dict(found.weights["modal"], strict=True)
    DFM(32, width=32, official_norm=True).load_state_dict(found.weights["fusion"], strict=True)
    UNetFormerHead(32, found.classes, width=32).load_state_dict(found.weights["head"], strict=True)


def test_every_key_is_accounted_for(shared):
    state = users_checkpoint(shared, "mmlora")
    found = convert_mfnet(state)
    assert found.report.keys() == state.keys()
    assert found.report["image_encoder.blocks.0.norm1.weight"] == "the same again"
    assert found.report["sam.image_encoder.blocks.1.attn.rel_h"] == "vit.blocks.1.attn.rel_pos_h"
    assert found.report["decoder.b3.attn.local1.0.weight"] == "head.blocks.1.attention.local3.0.weight"
    assert found.report["fusion2.se_depth.fc.2.bias"] == "fusion.weigh.1.1.up.bias"
    assert found.report["sam.prompt_encoder.not_a_point_embed.weight"] == "not used"
    lines = found.lines()
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) == len(state)
    assert any(line.startswith("not used: 3 keys, such as ") for line in lines)


def test_tables_that_upstream_never_loaded_are_noticed(shared):
    state = users_checkpoint(shared, "mmadapter")
    assert convert_mfnet({k: v.zero_() if "rel_" in k and "enc" in k else v for k, v in state.items()}).official_relpos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"decoder.b4.attn.unknown": torch.zeros(1), "lm.x": torch.zeros(1)}),
            "1 keys are none of MFNet's, lm.x",
        ),
        (
            lambda s: s.update({"image_encoder.pos_embed": torch.ones(1)}),
            "image_encoder.pos_embed is there twice, with dif",
        ),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder.")], "without head; give the whole model's"),
        (lambda s: [s.pop(k) for k in list(s) if "blocks.2.wy_" in k], "has layers.2.mix for one modality alone"),
        (lambda s: [s.pop(k) for k in list(s) if "Adapter" in k], "none of its .* keys has _Adapter or lora_"),
    ],
    ids=["unknown", "two copies differ", "no decoder", "one modality", "no MFNet"],
)
def test_checkpoints_that_are_no_mfnet_are_refused(change, message, shared):
    state = users_checkpoint(shared, "mmadapter")
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_mfnet(state)


def test_the_command_makes_an_adapter_of_a_users_checkpoint(shared, tmp_path, monkeypatch, capsys):
    """Encoder as in the vectors; pyramids and decoder of the published widths, at random."""
    small = partial(
        timm.create_model,
        "samvit_base_patch16",
        num_classes=0,
        embed_dim=32,
        depth=4,
        num_heads=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    monkeypatch.setattr(vit, "create_sam", lambda *_, **__: small())
    monkeypatch.setattr(vit.timm, "is_model", lambda name: True)
    monkeypatch.setattr(convert_mfnet_module, "BACKBONES", {32: "samvit_base_patch16"})
    backbone = Backbone(small())
    modules = {"fusion": DFM(32, official_norm=True, project=backbone.finish), "head": UNetFormerHead(256, 3)}
    state = users_checkpoint(shared, "mmlora")
    report = convert_mfnet(state).report
    random = torch.Generator().manual_seed(0)
    for key, became in report.items():
        part, _, name = became.partition(".")
        if part in modules:
            like = modules[part].state_dict()[name]
            state[key] = torch.rand(like.shape, generator=random)
        elif part == "vit" or became == "the same again":
            own = backbone.vit.state_dict().get(report.get(f"sam.{key}", became).removeprefix("vit."))
            if own is not None and own.shape != state[key].shape:
                state[key] = torch.ones(own.shape)
    torch.save(state, tmp_path / "mfnet.pth")
    options = ["--out", str(tmp_path / "out"), "--classes", "a,b,c", "--crop", "128"]
    assert convert.main([str(tmp_path / "mfnet.pth"), *options]) == 0, capsys.readouterr().err
    assert "MFNet (mfnet_lora), 4 blocks of width 32, 3 classes" in capsys.readouterr().out
    loaded = cegate.load(tmp_path / "out", device="cpu")
    found = convert_mfnet(state)
    for part in ("modal", "fusion", "head"):
        own = getattr(loaded, part).state_dict()
        assert all(torch.equal(own[name], value) for name, value in found.weights[part].items())
    assert torch.equal(loaded.vit.state_dict()["pos_embed"], found.weights["vit"]["pos_embed"])
    assert (loaded.recipe.mean, loaded.recipe.std) == ((0.0,) * 3, (1.0,) * 3) and loaded.recipe.stride == 128
    assert json.loads((tmp_path / "out/conversion.json").read_text())["keys"].keys() == state.keys()
