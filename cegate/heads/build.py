"""Heads by the name they have in the configuration."""

from __future__ import annotations

from cegate.errors import ConfigError, nearest
from cegate.heads.head import Head, LinearHead
from cegate.heads.unetformer import UNetFormerHead
from cegate.losses import PixelLoss

HEADS = ("linear", "mask2former", "unetformer")


def build_head(name: str, *, channels: int, classes: int, loss: PixelLoss | None = None, **options: int) -> Head:
    """Build a head by its name in the configuration.

    Args:
        name: ``linear``, ``mask2former`` or ``unetformer``.
        channels: channels C of each of the four maps.
        classes: classes K.
        loss: what it minimises; default: cross entropy, or ``mask2former``'s own, which takes class weights alone.
        options: further settings of the head; ``mask2former`` has ``queries``, ``width``, ``encoder_layers``,
            ``decoder_layers`` and ``points``, with the paper's values as defaults.

    Raises:
        ConfigError: there is no head of that name, or it cannot take the loss.
    """
    if loss and loss.class_weights is not None and len(loss.class_weights) != classes:
        raise ConfigError(
            f"train.loss.class_weights has {len(loss.class_weights)} numbers for {classes} classes; give one per class"
        )
    head = _new_head(name, channels, classes, options)
    if loss is not None:
        head.take_loss(loss)
    return head


def _new_head(name: str, channels: int, classes: int, options: dict[str, int]) -> Head:
    if name == "linear":
        return LinearHead(channels, classes, **options)
    if name == "mask2former":
        from cegate.heads.mask2former import Mask2FormerHead  # transformers takes seconds to import

        return Mask2FormerHead(channels, classes, **options)
    if name == "unetformer":
        return UNetFormerHead(channels, classes, **options)
    raise ConfigError(f"model.head={name!r} is not a head; use one of {', '.join(HEADS)}{nearest(name, HEADS)}")
