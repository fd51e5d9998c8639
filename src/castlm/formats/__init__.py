"""Numeric formats of weights, their rounding, and the format of packed files. Reading a packed file needs no torch."""
