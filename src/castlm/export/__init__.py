"""Writes results: Hugging Face folders, verified to be n:m sparse and to load as the trained model.

Imports nothing: `verify` counts the bytes of a file without torch, which `hf` needs.
"""
