"""The Mask2Former head beside the library's modules and a loss written sample by sample, layer by layer."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from cegate import ops
from cegate.heads.mask2former import Mask2FormerHead, _corners, _pyramid
from cegate.kernels._support import HAS_TRITON, is_interpreted
from cegate.kernels.deformable import deformable_attention

CHANNELS, CLASSES = 8, 4
WAITS = ("cpu", "tolist", "item", "numpy", "nonzero", "unique", "__int__", "__float__", "__bool__", "__index__")
"""Methods of a tensor for which the host waits for the device."""


@pytest.fixture
def head() -> Mask2FormerHead:
    head = Mask2FormerHead(CHANNELS, CLASSES, queries=7, width=32, encoder_layers=2, decoder_layers=5, points=80)
    with torch.no_grad():
        for (
            weight
        ) in head.parameters():  # sampling positions start on pixel centres, where bilinear sampling has a kink
            weight.add_(0.05 * torch.randn_like(weight))
    head.take_loss(type(head.pixel_loss)(class_weights=(1.0, 0.5, 2.0, 1.5)))
    return head.double()


def draw(batch: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features, and labels that differ in classes and valid pixels."""
    features = [torch.randn(batch, CHANNELS, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    labels = F.interpolate(torch.randint(0, CLASSES, (batch, 1, 5, 3)).float(), size=(60, 36))[:, 0].long()
    labels[0, :25], labels[1 % batch] = 255, 2
    return features, labels


def predictions_of_the_library(head: Mask2FormerHead, features) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    decoder = head.decoder
    pixels = decoder.pixel_decoder(_pyramid(features))
    found = decoder.transformer(list(pixels.multi_scale_features), pixels.mask_features)
    states = [state.transpose(0, 1) for state in found.intermediate_hidden_states]
    return [decoder.class_predictor(state) for state in states], list(found.masks_queries_logits)


def loss_of_a_sample(head: Mask2FormerHead, class_logits, mask_logits, label, seed: int) -> torch.Tensor:
    """From class logits [Q, K + 1] and mask logits [Q, h, w] of each layer."""
    settings, generator = head.criterion, torch.Generator().manual_seed(seed)
    y, x = (label != 255).nonzero(as_tuple=True)
    places = torch.stack([2 * (x.double() + 0.5) / label.shape[1], 2 * (y.double() + 0.5) / label.shape[0]], -1) - 1
    truth, present = label[y, x], label[y, x].unique()

    def at(masks, chosen):  # [R, h, w], [R, P]
        return F.grid_sample(masks[:, None], places[chosen][:, :, None], align_corners=False)[:, 0, :, 0]

    def terms(logits, target):  # [..., P]
        dice = 1 - (2 * (logits.sigmoid() * target).sum(-1) + 1) / (logits.sigmoid().sum(-1) + target.sum(-1) + 1)
        return 5 * F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1) + 5 * dice

    points, pairs = torch.randint(len(truth), (settings.num_points,), generator=generator), []
    for classes, masks in zip(class_logits, mask_logits, strict=True):
        logits = at(masks, points.expand(len(masks), -1))[:, None].expand(-1, len(present), -1)
        cost = terms(logits, (truth[points] == present[:, None]).double().expand_as(logits))
        cost = cost - 2 * classes.softmax(-1)[:, present]
        pairs.append([torch.as_tensor(side) for side in linear_sum_assignment(cost.detach())])

    loss, weight = 0, 0
    for classes, (query, entry) in zip(class_logits, pairs, strict=True):
        target = torch.full((len(classes),), CLASSES)
        target[query] = present[entry]
        loss = loss + F.cross_entropy(classes, target, settings.empty_weight, reduction="sum")
        weight = weight + settings.empty_weight[target].sum()
    loss = 2 * len(pairs) * loss / weight

    matched = torch.cat([masks[query] for masks, (query, _) in zip(mask_logits, pairs, strict=True)])
    own = torch.cat([present[entry] for _, entry in pairs])
    several = torch.randint(len(truth), (len(matched), 3 * settings.num_points), generator=generator)
    kept = int(0.75 * settings.num_points)
    least = several.gather(1, at(matched, several).abs().argsort(1)[:, :kept])
    rest = torch.randint(len(truth), (len(matched), settings.num_points - kept), generator=generator)
    chosen = torch.cat([least, rest], 1)
    masks = terms(at(matched, chosen), (truth[chosen] == own[:, None]).double())
    return loss + masks.sum() / len(present)


def gradients(head: Mask2FormerHead, losses: torch.Tensor, features) -> dict[str, torch.Tensor]:
    weights = dict(head.named_parameters()) | {f"feature {i}": f for i, f in enumerate(features)}
    scales = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)[: len(losses)]
    found = torch.autograd.grad((losses * scales).sum(), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def test_predictions_are_those_of_the_librarys_modules(head):
    features, _ = draw()
    classes, masks = predictions_of_the_library(head, features)
    found = head.decoder(features)
    torch.testing.assert_close(found.class_logits, torch.stack(classes), rtol=1e-9, atol=1e-11)
    for layer, expected in enumerate(masks):
        torch.testing.assert_close(found.mask_logits(layer), expected, rtol=1e-9, atol=1e-11)


def test_losses_and_gradients_are_those_of_a_loss_written_sample_by_sample(head):
    features, labels = draw()
    torch.manual_seed(4)
    losses = head.loss(features, labels)
    torch.manual_seed(4)
    seed = int(torch.randint(2**63 - 1, ()))
    classes, masks = predictions_of_the_library(head, features)
    expected = torch.stack(
        [loss_of_a_sample(head, [c[b] for c in classes], [m[b] for m in masks], labels[b], seed) for b in range(3)]
    )
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    wanted = gradients(head, expected, features)
    for name, gradient in gradients(head, losses, features).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("other", [-1, CLASSES, 254])
def test_labels_of_no_class_are_refused(head, other):
    features, labels = draw()
    labels[1, 3, 4] = other
    with pytest.raises(IndexError, match=f"labels are 0 to {CLASSES - 1}, or 255"):
        head.loss(features, labels)


def test_every_weight_learns_under_autocast(head):
    features, labels = draw()
    head.float()
    with torch.autocast("cpu", torch.bfloat16):  # its cache of converted weights knows nothing of gradients
        head.loss([f.float() for f in features], labels).sum().backward()
    assert [name for name, weight in head.named_parameters() if weight.grad is None or not weight.grad.any()] == []


class _Calls(TorchDispatchMode):
    """Counts operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not (HAS_TRITON and is_interpreted()), reason="Triton is not installed, or its interpreter is off")
def test_deformable_attention_by_its_kernel_gives_the_same_predictions_and_gradients(monkeypatch):
    head = Mask2FormerHead(CHANNELS, CLASSES, queries=7, width=32, encoder_layers=1, decoder_layers=2)
    features = [torch.randn(1, CHANNELS, 2, 3, requires_grad=True) for _ in range(4)]  # few: the interpreter is slow
    probe, calls = torch.randn(1, CLASSES, 24, 12), []

    def by_triton(*args, table, backend):
        calls.append(backend)
        chosen = {"auto": "triton"}.get(backend, backend)
        return deformable_attention(*args, table=table, backend=chosen)

    monkeypatch.setattr(ops, "_deformable_attention", by_triton)
    found = []
    for context in (nullcontext(), ops.fused()):
        with context:
            logits = head(features, (24, 12))
        weights = [weight for weight in head.decoder.pixel_decoder.parameters() if weight.requires_grad]
        found.append([logits, *torch.autograd.grad((logits * probe).sum(), [*features, *weights], allow_unused=True)])
    assert calls == ["torch", "auto"]
    largest = max(gradient.abs().max().item() for gradient in found[1][1:] if gradient is not None)
    for mine, other in zip(*found, strict=True):  # some are zero but for rounding: a norm follows
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * largest)


def waits_of_a_loss(head: Mask2FormerHead, batch: int, monkeypatch) -> tuple[Counter[str], Counter[str]]:
    """Calls for which a host waits: methods of tensors, operators."""
    features, labels = draw(batch)
    head.loss(features, labels)  # what depends on sizes alone is kept
    asked: Counter[str] = Counter()
    with monkeypatch.context() as patch, _Calls() as calls:
        for name in WAITS:
            own = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda x, *args, own=own, name=name: asked.update([name]) or own(x, *args)
            )
        head.loss(features, labels)
    waiting = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "masked_select", "bincount")
    return asked, Counter({name: calls.counts[name] for name in waiting if calls.counts[name]})


def test_waits_for_the_device_do_not_grow_with_the_batch(head, monkeypatch):
    (asked, operators), several = (waits_of_a_loss(head, batch, monkeypatch) for batch in (1, 3))
    assert (asked, operators) == several
    # the classes that are present, the costs; the seed is drawn on the host
    assert asked == {"tolist": 1, "cpu": 1, "numpy": 1, "__int__": 1}
    assert operators == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("size", [(1, 1), (3, 5)], ids=str)
def test_corners_are_those_of_bilinear_sampling(size):
    places = torch.cat([2.4 * torch.rand(50, 2, dtype=torch.float64) - 1.2, torch.tensor([[0.0, 0], [1, -1], [-1, 1]])])
    image = torch.randn(size, dtype=torch.float64)
    pixels, shares = _corners(places, size)
    expected = F.grid_sample(image[None, None], places[None, None], align_corners=False).flatten()
    torch.testing.assert_close((image.flatten()[pixels] * shares).sum(1), expected)
