"""Channels and attention heads: scores, and a cut that leaves a smaller dense model."""
