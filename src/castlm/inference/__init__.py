"""Running a sparse model: packed weights, kernels, quantization that keeps zeros, and advice on what pays off where."""

from castlm.inference.semi_structured import to_semi_structured_

__all__ = ["to_semi_structured_"]
