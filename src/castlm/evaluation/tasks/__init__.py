"""Task files for lm-eval over local data: `{folder}` stands for where it lies; see `castlm.evaluation.zero_shot`."""
