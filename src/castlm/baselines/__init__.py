"""The rivals: one-shot pruning (magnitude, Wanda, SparseGPT) and retraining (STE, SR-STE, AST, gradual magnitude)."""
