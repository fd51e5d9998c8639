"""Hugging Face models: found, opened, loaded and saved, and what they are made of."""
