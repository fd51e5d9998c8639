"""Training: the config, the loop, its objective, checkpoints and reports."""
