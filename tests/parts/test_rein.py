"""Rein on a plain ViT: the published numbers, its place among the sites, and no trace when it is gone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cegate
from cegate.adapter_folder import load_adapter, save_adapter
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Circuit, Tokens
from cegate.backbone.vit import weight_hash
from cegate.checkpoint import trained_weights
from cegate.config import (
    Config,
    DataConfig,
    FrequencyConfig,
    GateConfig,
    ModelConfig,
    RefinerConfig,
    SemanticConfig,
    SpatialConfig,
    ToolboxConfig,
)
from cegate.engine.schedule import parameter_groups
from cegate.errors import ConfigError
from cegate.gate import GatePlan
from cegate.parts.rein import Rein
from cegate.parts.toolbox import Toolbox

SMALL = ToolboxConfig(
    spatial=SpatialConfig(rank=4), semantic=SemanticConfig(width=6), frequency=FrequencyConfig(width=5)
)
CONFIG = Config(
    data=DataConfig(classes=["background", "building", "road"], crop=32),
    model=ModelConfig(weights="none"),
    toolbox=SMALL,
    gate=GateConfig(method="none"),
    refiner=RefinerConfig("rein", tokens=6, rank=2),
)
PUBLISHED = {
    "token_a": "learnable_tokens_a",
    "token_b": "learnable_tokens_b",
    "token_mlp": "mlp_token2feat",
    "patch_mlp": "mlp_delta_f",
    "query_mlp": "transform",
    "query_merge": "merge",
    "scale": "scale",
}


def small_vit(depth: int = 3, width: int = 48, **options: object) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=(48, 40), patch_size=8, embed_dim=width, depth=depth, num_heads=4, num_classes=0, **options
    )
    return vit.eval().requires_grad_(False)


def published_name(name: str) -> str:
    module, dot, part = name.partition(".")
    return PUBLISHED[module] + dot + part


def run(vit: nn.Module, images: torch.Tensor, *parts) -> torch.Tensor:
    """Tokens after the last block."""
    circuit = Circuit(plug for part in parts for plug in part.plugs())
    found, _ = Backbone(vit).tokens_after(images, [len(vit.blocks) - 1], circuit)
    return found[0]


def strengthen(*modules: nn.Module) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_queries_and_every_gradient_are_the_published_ones(shared, dtype):
    path = shared / "vectors" / "rein_3_layers.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as file:
        expected = {name: torch.as_tensor(file[name]).to(dtype) for name in file.files}
    rein = Rein(Backbone(small_vit()), RefinerConfig("rein", tokens=10, rank=4), query_width=16).to(dtype)
    with torch.no_grad():
        for name, weight in rein.named_parameters():
            weight.copy_(expected[f"w.{published_name(name)}"])
    x = y = expected["x"].clone().requires_grad_()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for _, layer, _, refine in rein.plugs():
        y = refine(y, Tokens(1, (6, 5)))
        torch.testing.assert_close(y, expected[f"y{layer}"], **close)
    queries = rein.queries()
    torch.testing.assert_close(queries, expected["queries"], **close)
    loss = (y * expected["probe"]).sum() + (queries * expected["probe_queries"]).sum()
    torch.testing.assert_close(loss, expected["loss"], **close)
    loss.backward()
    torch.testing.assert_close(x.grad, expected["dx"], **close)
    for name, weight in rein.named_parameters():
        torch.testing.assert_close(weight.grad, expected[f"g.{published_name(name)}"], **close)


def test_a_large_model_has_the_published_number_of_weights():
    with torch.device("meta"):
        vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=1024, depth=24, num_heads=16, num_classes=0)
        rein = Rein(Backbone(vit), RefinerConfig("rein"), query_width=256)
    assert sum(p.numel() for p in rein.parameters()) == 2_990_081


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": ""}, {"reg_tokens": 4}], ids=str)
def test_only_patch_tokens_of_a_block_are_refined(options):
    vit, images = small_vit(depth=1, **options), torch.randn(2, 3, 48, 40)
    plain = run(vit, images)
    rein = Rein(Backbone(vit), RefinerConfig("rein", tokens=5, rank=2))
    strengthen(rein)
    y, prefix = run(vit, images, rein), vit.num_prefix_tokens
    assert torch.equal(y[:, :prefix], plain[:, :prefix])
    torch.testing.assert_close(y[:, prefix:], rein.refine(plain[:, prefix:], 0))
    assert (y[:, prefix:] - plain[:, prefix:]).abs().max() > 0.1


@pytest.mark.parametrize("first", ["toolbox", "rein"])
def test_sites_come_before_the_refinement_whatever_is_plugged_in_first(first):
    vit, images = small_vit(depth=1), torch.randn(2, 3, 48, 40)
    toolbox, rein = Toolbox(Backbone(vit), SMALL), Rein(Backbone(vit), RefinerConfig("rein", tokens=5, rank=2))
    strengthen(toolbox, rein)
    toolbox.apply(GatePlan(toolbox.sites))
    parts = (toolbox, rein) if first == "toolbox" else (rein, toolbox)
    got, by_sites = run(vit, images, *parts), run(vit, images, toolbox)
    assert torch.equal(got[:, :1], by_sites[:, :1])
    torch.testing.assert_close(got[:, 1:], rein.refine(by_sites[:, 1:], 0))


def test_tokens_and_scale_do_not_decay_and_the_linear_maps_do():
    rein = Rein(Backbone(small_vit()), RefinerConfig("rein", tokens=5, rank=2), query_width=8)
    groups = parameter_groups([rein], 0.05)
    decays = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decays == {id(p) for name, p in rein.named_parameters() if name.endswith("weight")}
    assert sum(len(group["params"]) for group in groups) == len(list(rein.parameters()))


@pytest.mark.parametrize(("tokens", "rank"), [(1, 4), (10, 0)])
def test_sizes_that_refine_nothing_are_refused(tokens, rank):
    with pytest.raises(ConfigError, match=rf"refiner\.tokens={tokens}, refiner\.rank={rank}: use 2 tokens or more"):
        Rein(Backbone(small_vit()), RefinerConfig("rein", tokens=tokens, rank=rank))


def test_a_segmenter_learns_refiner_and_head_and_a_copy_stands_alone():
    segmenter = cegate.build(CONFIG)
    plain = cegate.build(replace(CONFIG, refiner=RefinerConfig()))
    assert plain.refiner is None
    assert all(torch.equal(a, b) for a, b in zip(segmenter.head.parameters(), plain.head.parameters(), strict=True))
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    segmenter.loss(images, labels).sum().backward()
    learned = {name.partition(".")[0] for name, p in segmenter.named_parameters() if p.grad is not None}
    assert learned == {"head", "refiner"}
    assert all(p.grad.abs().sum() > 0 for p in segmenter.refiner.parameters())
    twin = copy.deepcopy(segmenter)
    strengthen(segmenter.refiner)
    assert torch.equal(twin(images), cegate.build(CONFIG)(images))
    segmenter.adapts(False)
    assert torch.equal(segmenter(images), plain(images))


def test_mask2former_takes_its_queries_from_the_tokens():
    config = replace(CONFIG, model=replace(CONFIG.model, head="mask2former"))
    segmenter = cegate.build(config)
    transformer = segmenter.head.decoder.transformer
    positions, contents = transformer.queries_embedder, transformer.queries_features
    images, labels = torch.randn(1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))
    features = segmenter.neck(segmenter.encode(images), images)
    assert torch.equal(features.queries, segmenter.refiner.queries())
    assert features.queries.shape == (6, 256)
    with torch.no_grad():
        linked = segmenter.decode(features, (32, 32))
        positions.table.weight.copy_(features.queries)
        contents.table.weight.copy_(contents.change(features.queries))
        assert torch.equal(segmenter.decode(features._replace(queries=None), (32, 32)), linked)
    segmenter.loss(images, labels).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in segmenter.refiner.parameters())
    assert positions.table.weight.grad is None
    segmenter.adapts(False)
    assert segmenter.neck(features._replace(queries=None), images).queries is None


@pytest.mark.parametrize("head", ["linear", "mask2former"])
def test_an_adapter_folder_brings_the_refiner_along(tmp_path, head):
    segmenter = cegate.build(replace(CONFIG, model=replace(CONFIG.model, head=head))).eval()
    strengthen(segmenter.refiner)
    assert {name.partition(".")[0] for name in trained_weights(segmenter)} == {"toolbox", "refiner", "head"}
    save_adapter(tmp_path, segmenter, weight_hash(segmenter.vit), {})
    loaded = load_adapter(tmp_path, "cpu")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), segmenter(images))
    assert "6 rein tokens a layer" in (tmp_path / "README.md").read_text()
