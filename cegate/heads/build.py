"""Heads by the name they have in the configuration."""

from __future__ import annotations

from cegate.errors import ConfigError, nearest
from cegate.heads.head import Head, LinearHead
from cegate.heads.unetformer import UNetFormerHead

HEADS = ("linear", "mask2former", "unetformer")


def build_head(name: str, *, channels: int, classes: int, **options: int) -> Head:
    """Build a head by its name in the configuration.

    Args:
        name: ``linear``, ``mask2former`` or ``unetformer``.
        channels: channels C of each of the four maps.
        classes: classes K.
        options: further settings of the head; ``mask2former`` has ``queries``, ``width``, ``encoder_layers``,
            ``decoder_layers`` and ``points``, with the paper's values as defaults.

    Raises:
        ConfigError: there is no head of that name.
    """
    if name == "linear":
        return LinearHead(channels, classes, **options)
    if name == "mask2former":
        from cegate.heads.mask2former import Mask2FormerHead  # transformers takes seconds to import

        return Mask2FormerHead(channels, classes, **options)
    if name == "unetformer":
        return UNetFormerHead(channels, classes, **options)
    raise ConfigError(f"model.head={name!r} is not a head; use one of {', '.join(HEADS)}{nearest(name, HEADS)}")
