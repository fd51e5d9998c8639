"""The start: one-shot pruning of a model, transformer block by transformer block."""
