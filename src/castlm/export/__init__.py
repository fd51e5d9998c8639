"""What leaves castlm: a Hugging Face folder, behind the proof that it is n:m sparse and loads as what was trained.

Nothing is imported here: `verify` runs without torch, `hf` needs all of it.
"""
