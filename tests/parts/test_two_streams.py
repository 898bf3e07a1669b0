"""A whole model of two modalities: streams, SAM's encoder, sites of each modality, pyramid, decoder."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from cegate.backbone import sam
from cegate.backbone.backbone import FAMILIES, Backbone
from cegate.backbone.ports import Circuit
from cegate.config import FrequencyConfig, SemanticConfig, SpatialConfig, ToolboxConfig
from cegate.fisher import measure_fisher
from cegate.gate import GatePlan
from cegate.heads.unetformer import UNetFormerHead
from cegate.necks.dfm import DFM
from cegate.parts.mm_lora import MMLoRA
from cegate.parts.streams import Streams
from cegate.parts.toolbox import Toolbox

PATCH, CLASSES = 8, 3


class TwoModalities(nn.Module):
    """What the network does with these parts, in five lines."""

    def __init__(self, toolbox_streams=("dsm",), modal: type | None = None) -> None:
        super().__init__()
        self.vit = VisionTransformerSAM(
            img_size=8 * PATCH,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=16,
            depth=2,
            num_heads=2,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
            neck_chans=16,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ).requires_grad_(False)
        self.backbone = Backbone(self.vit)
        sizes = ToolboxConfig(
            spatial=SpatialConfig(rank=2), semantic=SemanticConfig(width=3), frequency=FrequencyConfig(width=2)
        )
        self.toolbox = Toolbox(self.backbone, sizes, toolbox_streams)
        self.streams, self.neck = Streams(("image", "dsm"), (3, 1)), DFM(16, width=16, project=self.backbone.finish)
        self.head = UNetFormerHead(16, CLASSES, width=16, heads=4, window=4)
        self.modal = None if modal is None else modal.build(self.backbone)
        for weight in (*self.toolbox.parameters(), *(self.modal.parameters() if self.modal else ())):
            nn.init.normal_(weight, std=0.3)
        for block in self.vit.blocks:
            nn.init.normal_(block.attn.rel_pos_h), nn.init.normal_(block.attn.rel_pos_w)

    def maps(self, images):
        plugs = [*self.toolbox.plugs(), *(self.modal.plugs() if self.modal else ())]
        features = self.backbone.run(self.streams(images), [1], Circuit(plugs), streams=2)
        return self.neck.change(features, images).maps

    def forward(self, images):
        return self.head(self.maps(images), tuple(images.shape[-2:]))

    def loss(self, images, labels):
        return self.head.loss(self.maps(images), labels)


@pytest.fixture(autouse=True)
def _known_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, VisionTransformerSAM, sam.Sam())


def draw(batch: int = 2, grid=(4, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch, 4, grid[0] * PATCH, grid[1] * PATCH, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (batch, *images.shape[-2:]))


def test_fisher_of_each_stream_is_the_squared_gradient_of_each_sample():
    """Cut windows (4 x 5 tokens in windows of 3): squares are of samples, never of windows."""
    model = TwoModalities().double().eval()
    images, labels = draw()
    scores = measure_fisher(model, model.toolbox, [SimpleNamespace(image=images, label=labels)])
    assert {site.stream for site in model.toolbox.sites} == {None, "dsm"} and len(scores) == 12
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    for site in model.toolbox.sites:
        weights, expected = list(model.toolbox.parameters_of(site).values()), 0.0
        for b in range(2):
            loss = model.loss(images[b : b + 1], labels[b : b + 1]).sum()
            expected += sum(g.square().sum().item() for g in torch.autograd.grad(loss, weights))
        assert scores[site] == pytest.approx(expected / 2, rel=1e-8), site
        assert expected > 0


def test_sites_of_a_stream_leave_the_other_stream_alone():
    model = TwoModalities().double().eval()
    images, _ = draw()
    batch = model.streams(images)

    def encoded(*sites):
        model.toolbox.apply(GatePlan([s for s in model.toolbox.sites if s in sites]))
        return model.backbone.run(batch, [1], Circuit(model.toolbox.plugs()), streams=2).maps[0].chunk(2)

    x, y = encoded()
    x_dsm, y_dsm = encoded("spatial.0.dsm", "semantic.1.dsm", "frequency.0.dsm")
    torch.testing.assert_close(x_dsm, x)
    assert (y_dsm - y).abs().max() > 1e-3
    x_own, y_own = encoded("spatial.0", "semantic.1", "frequency.0")
    torch.testing.assert_close(y_own, y)
    assert (x_own - x).abs().max() > 1e-3


@pytest.mark.parametrize("missing", ["nothing", "all of the dsm", "holes", "the image"])
def test_one_model_serves_whatever_is_known(missing):
    model = TwoModalities(modal=MMLoRA).double().eval()
    images, labels = draw()
    known = model(images)
    given = images.clone()
    if missing != "nothing":
        {"all of the dsm": given[:, 3:], "holes": given[:, 3:, 3:9, 5:20], "the image": given[:, :3]}[missing].fill_(
            torch.nan
        )
    logits = model(given)
    assert logits.shape == (2, CLASSES, 32, 40) and logits.isfinite().all()
    assert torch.equal(logits, known) == (missing == "nothing")
    model.loss(given, labels).sum().backward()
    assert all(w.grad.isfinite().all() for w in model.modal.parameters())


def test_a_step_moves_what_learns_and_nothing_else():
    model = TwoModalities(modal=MMLoRA).float()
    images, labels = draw()
    before = {name: w.clone() for name, w in model.named_parameters()}
    learning = [*model.modal.parameters(), *model.neck.parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    model.loss(images.float(), labels).mean().backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert moved == {"modal", "neck", "head"}
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters() if n.startswith("vit."))
