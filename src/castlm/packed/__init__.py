"""Packed n:m weights in memory, their CPU kernels, loading and generation with them, and 2:4 on a GPU."""
