"""Task files for lm-eval over local data. `{folder}` in them stands for the folder of the data; see `zero_shot`."""
