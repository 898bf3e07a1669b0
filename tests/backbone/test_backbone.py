"""The program of blocks against timm's own forward pass, family by family; what a circuit does at the ports."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import cegate
from cegate import ops
from cegate.backbone.backbone import Backbone
from cegate.backbone.blocks import read_weights, run_block
from cegate.backbone.ports import PORTS, Circuit, Plug, Tokens
from cegate.backbone.stream import Stream
from cegate.config import FrequencyConfig, SemanticConfig, SpatialConfig, ToolboxConfig
from cegate.errors import BackboneError
from cegate.gate import GatePlan
from cegate.kernels._support import HAS_TRITON, is_interpreted
from cegate.kernels.residual_norm import residual_norm
from cegate.parts.toolbox import Toolbox

SMALL = {"embed_dim": 96, "num_heads": 3}
# plain, class and register tokens, distilled, no class token, position of its own for the class token, rotary with
# fused and separate projections, added biases, gated MLPs, norms of queries and keys, RMSNorm, other activations
NAMES = {
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_giant_patch14_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_patch16_dinov3_qkvb": SMALL,
    "vit_7b_patch16_dinov3": SMALL,
    "vit_base_patch16_224.mae": SMALL,
    "deit_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": SMALL,
    "vit_tiny_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": SMALL,
    "eva_large_patch14_196": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_clip_quickgelu_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "aimv2_large_patch14_224": SMALL,
    "vit_so150m_patch16_reg4_gap_256": {"embed_dim": 96, "num_heads": 3},
}


def make(name: str, options: dict) -> nn.Module:
    side = 56 if "patch14" in name else 64
    vit = timm.create_model(name, num_classes=0, img_size=side, dynamic_img_size=True, depth=2, **options).eval()
    with torch.no_grad():
        for parameter in vit.parameters():  # fresh biases and scales are 0 or 1, and would hide a fault
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit


@pytest.mark.parametrize("name", NAMES)
def test_the_program_equals_timms_own_pass_forward_and_gradient(name):
    vit = make(name, NAMES[name])
    backbone, patch = Backbone(vit), vit.patch_embed.patch_size[0]
    assert len(set(backbone.forms)) == 1
    for size in (vit.patch_embed.img_size, (2 * patch, 5 * patch)):
        images = torch.randn(2, 3, *size, requires_grad=True)
        theirs = vit.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        ours = backbone.run(images, [0, 1])
        assert ours.grid == (size[0] // patch, size[1] // patch)
        probes = [torch.randn_like(theirs[0]) for _ in range(2)]
        gradients = []
        for maps in (theirs, ours.maps):
            gradients += torch.autograd.grad(sum((m * p).sum() for m, p in zip(maps, probes, strict=True)), images)
        for mine, other in zip(ours.maps, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6 * float(gradients[0].abs().max()))


def test_every_port_sees_samples_tokens_channels_and_what_it_returns_counts():
    vit = make("vit_small_patch14_reg4_dinov2", SMALL)
    backbone, seen, images = Backbone(vit), {}, torch.randn(2, 3, 28, 42)
    plain = backbone.run(images, [1]).maps[0]

    def add(port, *arguments):
        *tensors, tokens = arguments
        seen[port] = [tuple(tensor.shape) for tensor in tensors]
        assert tokens == Tokens(5, (2, 3))
        return tensors[-1] + 1

    width, hidden = 96, vit.blocks[0].mlp.fc1.out_features
    for port in PORTS:
        circuit = Circuit([Plug(port, 0, 0, lambda *arguments, port=port: add(port, *arguments))])
        changed = backbone.run(images, [1], circuit).maps[0]
        # the same number on every key and value cancels or passes; on the others it shows
        assert (changed - plain).abs().max() > 1e-3, port
    stream = (2, 11, width)
    assert seen == {
        "qkv": [stream, (2, 11, 3 * width)],
        "attention": [stream],
        "fc1": [stream, (2, 11, hidden)],
        "fc2": [(2, 11, hidden), stream],
        "mlp": [stream] * 3,
        "block": [stream],
    }


def test_plugs_at_one_port_run_in_their_order():
    vit = make("vit_tiny_patch16_224", {})
    scale, shift = (Plug("block", 1, 5, lambda y, _: y * 2), Plug("block", 1, 3, lambda y, _: y + 1))
    images = torch.randn(1, 3, 32, 32)
    plain, both = (Backbone(vit).run(images, [1], Circuit(plugs)).maps[0] for plugs in ([], [scale, shift]))
    torch.testing.assert_close(both, 2 * (plain + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block.attn, "qkv", nn.Sequential(block.attn.qkv)), r"attn\.qkv is Sequential"),
        (lambda block: setattr(block.mlp, "act", nn.Tanh()), r"mlp\.act is Tanh"),
        (lambda block: setattr(block, "norm1", nn.BatchNorm1d(192)), "normalises by BatchNorm1d"),
        (lambda block: delattr(block, "norm2"), "has no norm2"),
    ],
)
def test_a_block_out_of_the_ordinary_is_named(change, message):
    vit = make("vit_tiny_patch16_224", {})
    change(vit.blocks[1])
    with pytest.raises(BackboneError, match=rf"block 1 of VisionTransformer.*{message}"):
        Backbone(vit)


def test_a_model_that_passes_in_a_way_of_its_own_is_named():
    with pytest.raises(BackboneError, match="Cait runs its blocks in a way of its own; use a plain ViT"):
        Backbone(timm.create_model("cait_xxs24_224", pretrained=False))


def test_no_foreign_module_is_hooked_in_the_package():
    files = list(Path(cegate.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    hooked = [path.name for path in files if "register_forward" in path.read_text()]
    assert not hooked


@pytest.mark.skipif(not (HAS_TRITON and is_interpreted()), reason="Triton is not installed, or its interpreter is off")
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_224.mae"])
def test_fused_sums_and_norms_give_the_numbers_of_a_pass_as_written(name, monkeypatch):
    vit = make(name, SMALL).requires_grad_(False)
    backbone, calls = Backbone(vit), []
    toolbox = Toolbox(backbone, ToolboxConfig(semantic=SemanticConfig(width=3), frequency=FrequencyConfig(width=2)))
    with torch.no_grad():
        for parameter in toolbox.parameters():
            parameter.normal_(std=0.2)
    toolbox.apply(GatePlan(("spatial.0", "semantic.1", "frequency.1")))
    images = torch.randn(2, 3, *vit.patch_embed.img_size, requires_grad=True)

    def by_triton(*args, backend):
        calls.append(args)
        return residual_norm(*args, backend="triton")

    monkeypatch.setattr(ops, "_residual_norm", by_triton)
    found = []
    for context in (nullcontext(), ops.fused()):
        with context:
            maps = backbone.run(images, [1], Circuit(toolbox.plugs())).maps
        learning = [images, *toolbox.parameters(active_only=True)]
        found.append([*maps, *torch.autograd.grad(sum(m.square().sum() for m in maps), learning)])
    assert [args[1] is None for args in calls] == [
        True,
        False,
        False,
        False,
    ]  # before the first block there is no branch
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_a_block_with_sites_compiles_whole_and_gives_the_eager_numbers(name):
    vit = make(name, SMALL).requires_grad_(False)
    backbone = Backbone(vit)
    sizes = ToolboxConfig(
        spatial=SpatialConfig(rank=2), semantic=SemanticConfig(width=3), frequency=FrequencyConfig(width=2, cutoff=0.9)
    )
    toolbox = Toolbox(backbone, sizes)
    with torch.no_grad():
        for parameter in toolbox.parameters():
            parameter.normal_(std=0.2)
    toolbox.apply(GatePlan(toolbox.sites))
    images, graphs = torch.randn(2, 3, 4 * backbone.patch, 4 * backbone.patch), []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    x, grid, beside = backbone.family.stem(vit, images)
    rope = beside[0] if beside else None
    tokens = Tokens(backbone.prefix, grid)
    compiled = torch.compile(run_block, backend=count, fullgraph=True)
    for layer in range(backbone.depth):
        weights = read_weights(vit.blocks[layer])
        learned = [p for site in toolbox.sites if site.layer == layer for p in toolbox.parameters_of(site).values()]
        outputs = []
        for run in (run_block, compiled):
            leaf = x.clone().requires_grad_()
            ports = Circuit(toolbox.plugs()).at(layer)
            y = run(backbone.forms[layer], weights, Stream(leaf), rope, ports, tokens).total()
            outputs.append([y, *torch.autograd.grad(y.square().mean(), [leaf, *learned])])
        for eager, found in zip(*outputs, strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    assert 1 <= len(graphs) <= backbone.depth
