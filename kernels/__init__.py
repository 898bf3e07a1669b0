"""Fused operators, installed as ``cegate.kernels``; reached through :mod:`cegate.ops` only."""
