"""Perplexity of a text, and zero-shot tasks through lm-eval."""
