"""Packed n:m weights on disk and in memory, the CPU kernels that multiply by them, and what loads and runs them.

Nothing is imported here: the file format is read without torch, the loaders need all of it.
"""
