"""Task files of lm-eval for local data. `{folder}` in them is the folder of the data; see `zero_shot`."""
