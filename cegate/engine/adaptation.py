"""The teacher of self-training (DACS, WACV 2021): the running mean of the student's weights, over the same backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cegate.checkpoint import trained_weights
from cegate.config import IGNORE
from cegate.data.stream import DomainPair
from cegate.segmenter import Segmenter


class Teacher:
    """A second set of a segmenter's trained weights; backbone, hooks and gate plan are the student's own.

    Nothing of the frozen backbone is held twice (a tuned one is learned, so it has a running mean too). Because the
    plan is shared, a site that is switched off is off for both; its weights go on approaching the student's.

    Args:
        segmenter: the student; the teacher starts as its equal.
        ema: largest share of its old weights that the teacher keeps in one iteration.
    """

    def __init__(self, segmenter: Segmenter, ema: float) -> None:
        self.segmenter, self.ema = segmenter, ema
        self.weights = {name: value.clone() for name, value in trained_weights(segmenter).items()}

    def follow(self, iteration: int) -> None:
        """Move towards the student, after its step of an iteration t >= 0, and keep the share
        ``min(1 - 1 / (t + 1), ema)``; after the first step the two are equal."""
        average = get_ema_multi_avg_fn(min(1 - 1 / (iteration + 1), self.ema))
        average(list(self.weights.values()), list(trained_weights(self.segmenter).values()), None)

    @torch.no_grad()
    def label(self, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels: the likeliest class of every pixel, in evaluation mode. Draws nothing at random.

        Args:
            images: [B, bands, H, W] normalised float32.
            valid: [B, H, W] bool, where there is something to label.

        Returns:
            label [B, H, W] int64, 255 where not valid, and how likely it is, [B, H, W] float32.
        """
        student = self.segmenter
        was_training = student.training
        student.eval()
        try:
            logits = functional_call(student, self.weights, (images,))
        finally:
            student.train(was_training)
        share, label = logits.float().softmax(1).max(1)
        return label.masked_fill(~valid, IGNORE), share

    def state(self) -> dict[str, Tensor]:
        """The weights, for a checkpoint."""
        return self.weights

    def load_state(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from the weights of a checkpoint of the same model."""
        for name, value in self.weights.items():
            value.copy_(weights[name])


def mix_domains(pair: DomainPair, pseudo: Tensor) -> tuple[Tensor, Tensor]:
    """ClassMix across domains: the chosen classes of each source crop pasted onto the target crop of its slot.

    Colours are not changed once more, as DACS does with the mixture: the paper's recipe names no such step, and each
    half has had its own photometric change in the stream.

    Args:
        pair: with a target.
        pseudo: [B, H, W] int64 label of the target crops, 255 ignored.

    Returns:
        image [B, C, H, W] and label [B, H, W].
    """
    image = torch.where(pair.pasted[:, None], pair.source.image, pair.target.image)
    return image, torch.where(pair.pasted, pair.source.label, pseudo)


def share_of_sure(likely: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Share [] of a batch's valid pixels [B, H, W] whose class is at least as likely as the threshold; 0 without any.

    What the target's pixels of a mixture weigh in DACS; those of the source, whose labels are true, weigh 1.
    """
    return ((likely >= threshold) & valid).sum() / valid.sum().clamp(min=1)
