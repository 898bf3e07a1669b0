from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from cegate.errors import ConfigError
from cegate.heads.build import HEADS, build_head
from cegate.heads.head import Head
from cegate.heads.mask2former import Predictions
from cegate.losses import pixel_cross_entropy

CHANNELS, CLASSES = 16, 3
SMALL = {
    "linear": {},
    "mask2former": {"queries": 8, "width": 32, "encoder_layers": 1, "decoder_layers": 3, "points": 96},
    "unetformer": {"skips": False, "width": 16, "heads": 2, "window": 4},
}
every_head = pytest.mark.parametrize("name", HEADS)


def small_head(name: str, **options: int) -> Head:
    head = build_head(name, channels=CHANNELS, classes=CLASSES, **{**SMALL[name], **options})
    return head.eval() if name == "unetformer" else head  # its batch norm ties samples together in train mode only


def draw_features(batch: int = 3, grid: tuple[int, int] = (4, 3), dtype: torch.dtype = torch.float32):
    return [torch.randn(batch, CHANNELS, *grid, dtype=dtype, requires_grad=True) for _ in range(4)]


def gradients(name: str, features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the maps that the head looks at."""
    return [f.grad for f in (features[-1:] if name == "unetformer" else features)]


def draw_labels(batch: int = 3, size: tuple[int, int] = (64, 48)) -> torch.Tensor:
    labels = torch.randint(0, CLASSES, (batch, 1, 4, 3)).float()
    return F.interpolate(labels, size=size)[:, 0].long()


def seeded_loss(head: Head, features, labels) -> torch.Tensor:
    torch.manual_seed(5)
    return head.loss(features, labels)


@every_head
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)], ids=str)
def test_any_grid_gives_logits_of_any_size_and_a_loss(name, grid):
    head, features = small_head(name), draw_features(2, grid)
    logits = head(features, (50, 33))
    assert logits.shape == (2, CLASSES, 50, 33)
    assert logits.isfinite().all()
    loss = head.loss(features, torch.randint(0, CLASSES, (2, 50, 33)))
    assert loss.shape == (2,)
    assert loss.isfinite().all()


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_of_a_sample_does_not_depend_on_its_batch(name, dtype):
    head, features, labels = small_head(name).to(dtype), draw_features(dtype=dtype), draw_labels()
    labels[0, :30] = 255  # samples differ in valid pixels
    labels[1] = 1  # and in the number of masks
    together = seeded_loss(head, features, labels)
    alone = torch.cat([seeded_loss(head, [f[b : b + 1] for f in features], labels[b : b + 1]) for b in range(3)])
    assert together.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=0)


@every_head
def test_weight_gradients_of_a_batch_are_those_of_its_samples(name):
    head, features, labels = small_head(name).double(), draw_features(dtype=torch.float64), draw_labels()
    labels[0, :30] = 255
    seeded_loss(head, features, labels).sum().backward()
    together = {n: w.grad.clone() for n, w in head.named_parameters()}
    head.zero_grad()
    for b in range(3):
        seeded_loss(head, [f[b : b + 1] for f in features], labels[b : b + 1]).sum().backward()
    for n, w in head.named_parameters():
        torch.testing.assert_close(w.grad, together[n], rtol=1e-9, atol=1e-12, msg=n)


@every_head
def test_loss_of_one_sample_has_no_gradient_in_another(name):
    head, features = small_head(name), draw_features()
    head.loss(features, draw_labels())[1].backward()
    for gradient in gradients(name, features):
        assert gradient[1].abs().sum() > 0
        assert gradient[[0, 2]].abs().sum() == 0


@every_head
@pytest.mark.parametrize("batch", [1, 3])
def test_sample_without_valid_pixels_has_no_loss_and_no_gradient(name, batch):
    head, features, labels = small_head(name), draw_features(batch), draw_labels(batch)
    labels[0] = 255
    loss = head.loss(features, labels)
    loss.sum().backward()
    assert loss[0] == 0
    assert (loss[1:] > 0).all()
    assert all(gradient[0].abs().sum() == 0 for gradient in gradients(name, features))


@every_head
def test_weights_of_one_value_scale_the_loss(name):
    head, features, labels = small_head(name), draw_features(), draw_labels()
    torch.manual_seed(0)
    plain = head.loss(features, labels)
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 0.25, 2.0])[:, None, None].expand(labels.shape)
    torch.testing.assert_close(head.loss(features, labels, weights), plain * torch.tensor([0.0, 0.25, 2.0]))


def test_linear_logits_are_not_enlarged_in_half_precision(monkeypatch):
    enlarge, seen = F.interpolate, []  # autocast widens it by itself on a CPU, and not on a GPU
    monkeypatch.setattr(F, "interpolate", lambda x, **options: seen.append(x.dtype) or enlarge(x, **options))
    with torch.autocast("cpu", torch.bfloat16):
        small_head("linear")(draw_features(), (64, 48))
    assert set(seen) == {torch.float32}


@every_head
def test_every_weight_learns(name):
    head = small_head(name)
    head.loss(draw_features(), draw_labels()).sum().backward()
    without = [n for n, w in head.named_parameters() if w.grad is None or not w.grad.isfinite().all()]
    assert without == []


@every_head
def test_softmax_of_the_logits_is_a_distribution_that_serves_as_likelihood(name):
    head, features, labels = small_head(name), draw_features(), draw_labels()
    logits = head(features, (64, 48))
    nll = pixel_cross_entropy(logits, labels)
    nll.sum().backward()
    assert nll.min() > 0
    assert nll.max() < 10
    assert all(gradient.isfinite().all() for gradient in gradients(name, features))
    torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(3, 64, 48))


@every_head
def test_bfloat16_autocast_gives_a_float32_loss_near_the_exact_one(name):
    head, features, labels = small_head(name), draw_features(), draw_labels()
    exact = seeded_loss(head, features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded_loss(head, features, labels)
        head(features, (64, 48))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(name, features))


@every_head
def test_half_precision_features_are_accepted_under_autocast(name):
    head, features = small_head(name), [f.bfloat16() for f in draw_features()]
    with torch.autocast("cpu", torch.bfloat16):
        assert head.loss(features, draw_labels()).isfinite().all()
        assert head(features, (64, 48)).isfinite().all()


@every_head
def test_logits_leave_the_random_state_alone(name):
    head, features = small_head(name), draw_features()
    before = torch.get_rng_state()
    head(features, (64, 48))
    assert torch.equal(torch.get_rng_state(), before)


@every_head
def test_loss_advances_the_random_state_by_the_same_amount_for_every_batch(name):
    head = small_head(name)
    states = []
    for batch, ignored in [(3, False), (1, False), (2, True)]:
        labels = torch.full((batch, 64, 48), 255) if ignored else draw_labels(batch)
        features = draw_features(batch)
        seeded_loss(head, features, labels)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_points_follow_the_random_state_and_move_on_with_it():
    head, features, labels = small_head("mask2former"), draw_features(), draw_labels()
    torch.manual_seed(5)
    first, state = head.loss(features, labels), torch.get_rng_state()
    second = head.loss(features, labels)
    assert not torch.equal(first, second), "every call draws points anew"
    torch.set_rng_state(state)
    assert torch.equal(head.loss(features, labels), second), "a resumed run goes on with the same points"


@every_head
def test_inference_before_training_does_not_disturb_it(name):
    head, features, labels = small_head(name), draw_features(), draw_labels()
    with torch.inference_mode():
        head(features, (64, 48))
    seeded_loss(head, features, labels).sum().backward()


@every_head
def test_saved_weights_give_the_same_logits(name):
    head, features = small_head(name), draw_features()
    other = small_head(name)
    assert not torch.equal(other(features, (9, 9)), head(features, (9, 9)))
    other.load_state_dict(copy.deepcopy(head.state_dict()), strict=True)
    assert torch.equal(other(features, (9, 9)), head(features, (9, 9)))


@pytest.mark.parametrize(("name", "steps"), [("linear", 60), ("mask2former", 120)])
def test_training_learns_what_the_features_tell(name, steps):
    head, truth = small_head(name), draw_labels(2, (16, 16))
    clues = F.interpolate(F.one_hot(truth, CLASSES).permute(0, 3, 1, 2).float(), size=(8, 8))
    features = [
        F.pad(clues, (0, 0, 0, 0, 0, CHANNELS - CLASSES)) + 0.1 * torch.randn(2, CHANNELS, 8, 8) for _ in "1234"
    ]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(features, truth).mean().backward()
        optimizer.step()
    agreement = (head(features, (16, 16)).argmax(1) == truth).float().mean()
    assert agreement > 0.9


def test_linear_head_judges_each_token_by_itself():
    head, features = small_head("linear"), draw_features(1, (4, 4))
    logits = head(features, (4, 4))
    changed = [f.detach().clone() for f in features]
    for f in changed:
        f[:, :, 1, 2] += torch.randn(CHANNELS)
    differs = (head(changed, (4, 4)) != logits).any(1)[0]
    assert differs.nonzero().tolist() == [[1, 2]]


def test_linear_head_upsamples_bilinearly():
    head, features = small_head("linear"), draw_features()
    coarse = head(features, (4, 3))
    expected = F.interpolate(coarse, size=(64, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(features, (64, 48)), expected)


def test_mask2former_starts_as_its_authors_intend():
    decoder = small_head("mask2former").decoder
    offsets = decoder.pixel_decoder.encoder.layers[0].self_attn.sampling_offsets
    heads, levels, points = 8, 3, 4
    directions = offsets.bias.detach().view(heads, levels, points, 2)
    assert offsets.weight.abs().sum() == 0
    assert len({tuple(d) for d in directions[:, 0, 0].round(decimals=4).tolist()}) == heads
    torch.testing.assert_close(directions[:, :, 3], 4 * directions[:, :, 0])
    assert 0.8 < decoder.pixel_decoder.level_embed.std() < 1.2
    assert 0.8 < decoder.transformer.queries_features.weight.std() < 1.2
    assert all(w.isfinite().all() for w in decoder.parameters())


def test_mask2former_defaults_are_the_papers():
    head = build_head("mask2former", channels=CHANNELS, classes=CLASSES)
    found = head.decoder(draw_features(1, (2, 3)))
    assert found.class_logits.shape == (10, 1, 100, CLASSES + 1)
    assert found.mask_logits(-1).shape == (1, 100, 8, 12)  # a quarter of 32 x 48 pixels
    assert len(head.decoder.pixel_decoder.encoder.layers) == 6
    assert len(head.decoder.transformer.decoder.layers) == 9
    assert head.decoder.config.hidden_dim == 256
    assert head.criterion.num_points == 12544
    assert head.criterion.weight_dict == {"class": 2.0, "mask": 5.0, "dice": 5.0}
    assert head.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 0.1])


def predictions_of(class_logits: torch.Tensor, mask_logits: list[torch.Tensor]) -> Predictions:
    """Of one sample, whose layers have class logits [L, Q, K + 1] and mask logits L of [Q, h, w]."""
    h, w = mask_logits[0].shape[1:]
    every_pixel = torch.eye(h * w, dtype=class_logits.dtype).view(1, h * w, h, w)
    return Predictions(class_logits[:, None], torch.stack(mask_logits).flatten(2)[:, None], every_pixel)


def loss_of(criterion, class_logits, mask_logits, labels: torch.Tensor) -> torch.Tensor:
    return criterion(predictions_of(class_logits, mask_logits), labels[None], seed=3)[0]


def drawn_predictions(labels, layers: int = 3, queries: int = 8):
    """Layers of predictions that lean towards the truth, so that any points give the same assignment."""
    masks = F.one_hot(labels, CLASSES).permute(2, 0, 1).float()
    masks = F.interpolate(masks[None], scale_factor=0.25, mode="area")[0]
    masks = torch.cat([6 * masks - 3, torch.full((queries - CLASSES, *masks.shape[1:]), -4.0)])
    mask_logits = [masks + torch.randn_like(masks) for _ in range(layers)]
    return torch.randn(layers, queries, CLASSES + 1), mask_logits


def test_mask2former_loss_is_the_librarys_up_to_the_drawing_of_points():
    labels = draw_labels(1, (192, 256))[0]
    labels[:96, :128], labels[96:, :128] = 0, 2
    class_logits, mask_logits = drawn_predictions(labels)
    criterion = small_head("mask2former", points=20_000).criterion
    ours = loss_of(criterion, class_logits, mask_logits, labels)

    library = Mask2FormerLoss(small_head("mask2former", points=20_000).decoder.config, {})
    present = labels.unique()
    layers = [
        {"class_queries_logits": c[None], "masks_queries_logits": m[None]}
        for c, m in zip(class_logits, mask_logits, strict=True)
    ]
    truth = [(labels == present[:, None, None]).float()]
    parts = library(mask_logits[-1][None], class_logits[-1:], truth, [present], layers[:-1])
    theirs = sum((2 if "cross_entropy" in part else 5) * loss for part, loss in parts.items())
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


def test_mask2former_loss_does_not_see_predictions_on_ignored_pixels():
    labels = draw_labels(1, (64, 48))[0]
    class_logits, mask_logits = drawn_predictions(labels)
    labels[:, :24] = 255
    criterion = small_head("mask2former").criterion
    loss = loss_of(criterion, class_logits, mask_logits, labels)
    for masks in mask_logits:
        masks[:, :, :5] = 50 * torch.randn(8, 16, 5)  # mask pixel 5 still reaches into the valid half, bilinearly
    assert torch.equal(loss_of(criterion, class_logits, mask_logits, labels), loss)
    for masks in mask_logits:
        masks[:, :, 7] += 1
    assert not torch.equal(loss_of(criterion, class_logits, mask_logits, labels), loss)


def test_mask2former_loss_takes_more_classes_than_queries():
    head, features = small_head("mask2former", queries=2), draw_features()
    assert head.loss(features, draw_labels()).isfinite().all()


def test_mask2former_logits_are_the_class_shares_of_the_queries():
    head, features = small_head("mask2former").double(), draw_features(dtype=torch.float64)
    found = head.decoder(features)
    classes = found.class_logits[-1].softmax(-1)[..., :-1]
    masks = F.interpolate(found.mask_logits(-1), size=(20, 30), mode="bilinear", align_corners=False).sigmoid()
    mass = torch.einsum("bqk,bqhw->bkhw", classes, masks)
    shares = head(features, (20, 30)).softmax(1)
    torch.testing.assert_close(shares, mass / mass.sum(1, keepdim=True), rtol=1e-9, atol=1e-10)


def test_mask2former_logits_and_gradients_survive_saturated_queries(monkeypatch):
    head = small_head("mask2former")
    classes = torch.full((1, 8, CLASSES + 1), -200.0)
    classes[..., -1] = 200  # every query says no object
    classes[:, 0, 1] = 0
    masks = torch.full((1, 8, 4, 4), -1000.0)
    masks[:, 0] = -900
    classes.requires_grad_(), masks.requires_grad_()
    found = predictions_of(classes, [masks[0]])
    monkeypatch.setattr(head.decoder, "forward", lambda features, queries=None: found)
    logits = head(draw_features(1), (16, 16))
    assert (logits.argmax(1) == 1).all()
    pixel_cross_entropy(logits, torch.zeros(1, 16, 16, dtype=torch.long)).sum().backward()
    assert logits.isfinite().all()
    assert classes.grad.isfinite().all()
    assert masks.grad.isfinite().all()


def test_unknown_head_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"'mask2fromer' .* use one of linear, mask2former, unetformer; did you mean 'mask2former'"
    ):
        build_head("mask2fromer", channels=CHANNELS, classes=CLASSES)


@pytest.mark.parametrize("width", [0, 48])
def test_width_that_the_normalisation_cannot_split_is_refused(width):
    with pytest.raises(ConfigError, match=rf"width={width} .* multiple of 32"):
        small_head("mask2former", width=width)
