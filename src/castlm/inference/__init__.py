"""Packed n:m weights on disk and in memory, their CPU kernels, and loading and generation with them; quantization that
keeps zeros, 2:4 on a GPU where it is faster, and advice on formats.

Imports nothing: the file format is read without torch, which the loaders need.
"""
