from __future__ import annotations

import pytest
import torch

import cegate
from cegate.errors import ConfigError
from cegate.heads.build import build_head
from cegate.losses import PixelLoss, pixel_cross_entropy, pixel_loss_of


def test_loss_is_the_mean_negative_log_probability_of_the_valid_pixels():
    probability = torch.tensor([[0.5, 0.25], [0.8, 0.1]])  # of class 1, pixel by pixel
    logits = torch.stack([(1 - probability).log(), probability.log()])[None]
    labels = torch.tensor([[[1, 0], [255, 1]]])
    expected = -torch.tensor([0.5, 0.75, 0.1]).log().mean()
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), expected[None])


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    logits, labels = torch.randn(3, 4, 6, 5, dtype=torch.float64), torch.randint(0, 4, (3, 6, 5))
    labels[1, :4] = 255  # other samples must not be divided by another number of pixels
    alone = torch.cat([pixel_cross_entropy(logits[b : b + 1], labels[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), alone, rtol=1e-14, atol=0)


def test_sample_without_valid_pixels_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[1] = 255
    loss = pixel_cross_entropy(logits, labels)
    loss.sum().backward()
    assert loss[0] > 0
    assert loss[1] == 0
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_averaged_in_float32(dtype):
    logits, labels = torch.randn(1, 3, 64, 64).to(dtype), torch.randint(0, 3, (1, 64, 64))
    loss = pixel_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pixel_cross_entropy(logits.float(), labels), rtol=0, atol=0)


def test_a_pixel_counts_as_much_as_its_weight_says():
    logits, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    labels[:, 0] = 255
    left = torch.zeros(4, 5, dtype=torch.bool).index_fill_(1, torch.tensor([0, 1]), True)
    halves = [pixel_cross_entropy(logits, labels.where(half, 255)) for half in (left, ~left)]
    expected = (2 * 6 * halves[0] + 0.5 * 9 * halves[1]) / 15
    found = pixel_cross_entropy(logits, labels, torch.where(left, 2.0, 0.5).expand(2, 4, 5))
    torch.testing.assert_close(found, expected)


def test_gradient_is_exact():
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1, 255], [2, 2, 1]], [[255, 255, 0], [1, 0, 2]]])
    assert torch.autograd.gradcheck(lambda x: pixel_cross_entropy(x, labels), logits)


FACTORS = (0.5, 2.0, 1.0, 0.0)
LOSSES = ["ce", "dice", "focal", "ce+dice", "dice+focal+ce"]


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels with ignored pixels and a class that the second sample lacks, and weights."""
    logits, labels = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randint(0, 4, (3, 5, 6))
    labels[:, 0], labels[2] = 255, 255
    labels[1] = labels[1].where(labels[1] != 2, 1)
    return 3 * logits, labels, torch.rand(3, 5, 6, dtype=torch.float64)


def pixel_by_pixel(name, logits, labels, factors, weights) -> list[float]:
    """The sums as they are written in a book."""
    found = []
    for z, y, w in zip(logits, labels, weights, strict=True):
        pixels = [(z[:, i, j].exp() / z[:, i, j].exp().sum(), int(y[i, j]), w[i, j]) for i, j in (y != 255).nonzero()]
        total = 0.0
        for term in name.split("+"):
            if term == "dice":
                of_class = []
                for k in {k for _, k, _ in pixels}:
                    both = sum(u * p[k] for p, truth, u in pixels if truth == k)
                    area = sum(u * (p[k] + (truth == k)) for p, truth, u in pixels)
                    of_class.append(factors[k] * (1 - 2 * both / area))
                mean_weight = sum(u for *_, u in pixels) / max(len(pixels), 1)
                total += sum(of_class) / max(len(of_class), 1) * mean_weight
            else:
                power = 2 if term == "focal" else 0
                terms = [-u * factors[k] * (1 - p[k]) ** power * p[k].log() for p, k, u in pixels]
                total += sum(terms) / max(len(pixels), 1)
        found.append(float(total))
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factors", [None, FACTORS], ids=str)
def test_losses_are_the_sums_of_the_book(name, factors):
    logits, labels, weights = drawn()
    loss = pixel_loss_of(name, factors)
    expected = torch.tensor(pixel_by_pixel(name, logits, labels, factors or (1,) * 4, weights), dtype=torch.float64)
    torch.testing.assert_close(loss(logits, labels, weights), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss(logits, labels, 3 * weights), 3 * expected, rtol=1e-12, atol=1e-12)
    unweighed = pixel_by_pixel(name, logits, labels, factors or (1,) * 4, torch.ones_like(weights))
    torch.testing.assert_close(loss(logits, labels), torch.tensor(unweighed, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_of_a_sample_alone_and_ignored_pixels_count_nowhere(name):
    logits, labels, weights = drawn()
    logits.requires_grad_()
    loss = pixel_loss_of(name, FACTORS)
    whole = loss(logits, labels, weights)
    alone = torch.cat([loss(logits[b : b + 1], labels[b : b + 1], weights[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-14, atol=0)
    whole.sum().backward()
    assert whole[2] == 0 and not logits.grad[:, :, 0].any() and not logits.grad[2].any() and logits.grad[:2].any()
    elsewhere = logits.detach().clone()
    elsewhere[:, :, 0] += 100 * torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(loss(elsewhere, labels, weights), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_all_losses_are_exact(name):
    logits, labels, weights = drawn()
    small = logits[:, :, :2, :3].clone().requires_grad_()
    loss = pixel_loss_of(name, FACTORS)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels[:, 1:3, :3], weights[:, :2, :3]), small)


def test_extreme_logits_and_half_precision_stay_finite():
    loss, labels = pixel_loss_of("ce+dice+focal"), torch.zeros(1, 2, 2, dtype=torch.int64)
    for value in (60000.0, -60000.0):
        logits = torch.zeros(1, 3, 2, 2, dtype=torch.float16)
        logits[:, 0] = value
        logits.requires_grad_()
        found = loss(logits, labels)
        found.sum().backward()
        assert found.dtype == torch.float32 and found.isfinite().all() and logits.grad.isfinite().all()


def test_the_configuration_reaches_every_head(small):
    maps, labels = [torch.randn(2, 8, 2, 2) for _ in range(4)], torch.randint(0, 4, (2, 32, 32))
    loss = pixel_loss_of("ce+dice", FACTORS)
    head = build_head("linear", channels=8, classes=4, loss=loss)
    torch.testing.assert_close(head.loss(maps, labels), loss(head(maps, (32, 32)), labels))
    weights = "[1, 2, 1, 1, 3]"
    assert cegate.build(small(train__loss__name="focal", train__loss__class_weights=weights)).head.pixel_loss == (
        PixelLoss(("focal",), (1.0, 2.0, 1.0, 1.0, 3.0))
    )
    with pytest.raises(ConfigError, match=r"class_weights has 4 numbers for 3 classes; give one per class"):
        build_head("linear", channels=8, classes=3, loss=loss)
    with pytest.raises(ConfigError, match=r"train\.loss\.name=dice: model\.head=mask2former brings its own loss"):
        small(train__loss__name="dice", model__head="mask2former")


def test_mask2former_weighs_classes_in_its_class_term_alone():
    made = {"channels": 8, "classes": 2, "queries": 4, "width": 32, "encoder_layers": 1, "decoder_layers": 2}
    torch.manual_seed(0)
    plain = build_head("mask2former", points=16, **made)
    weighed = build_head("mask2former", points=16, loss=pixel_loss_of("ce", (3.0, 0.0)), **made)
    weighed.decoder.load_state_dict(plain.decoder.state_dict())
    assert weighed.criterion.empty_weight.tolist() == [3.0, 0.0, plain.criterion.empty_weight[-1]]
    maps, labels = [torch.randn(1, 8, 4, 4) for _ in range(4)], torch.randint(0, 2, (1, 32, 32))
    losses = []
    for head in (plain, weighed):
        torch.manual_seed(1)
        losses.append(head.loss(maps, labels))
    assert not torch.equal(*losses)
    with pytest.raises(ConfigError, match="brings its own loss"):
        weighed.take_loss(pixel_loss_of("dice"))
