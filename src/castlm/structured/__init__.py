"""Patterns of whole units, MLP channels and attention heads: their masks, scores, one-shot solver, cut and counting."""
