"""Heads: features of a frozen backbone -> logits and the loss of each sample alone."""
