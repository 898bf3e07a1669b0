"""Frozen vision transformers as programs of blocks, with ports where something can be added."""
