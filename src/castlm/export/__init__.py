"""What leaves castlm: a Hugging Face folder that is verified to be n:m sparse and to load as the trained model.

Nothing is imported here: `verify` counts the bytes of a file without torch, `hf` needs it.
"""
