from __future__ import annotations

import pytest
import torch

from cegate.losses import pixel_cross_entropy


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
