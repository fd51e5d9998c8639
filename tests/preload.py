"""The imports of all processes of `tests.ranks`, made once by their server. It starts no thread: they are forks."""

import contextlib
import gc
import os
from importlib import import_module

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

gc.disable()  # a million objects that stay, which each collection would walk through
for name in (
    "pytest",
    "torch",
    "transformers.models.gemma.modeling_gemma",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "castlm.training.train",
):
    import_module(name)
for name in ("peft", "torch.utils.tensorboard"):
    with contextlib.suppress(ImportError):
        import_module(name)
with contextlib.suppress(ImportError):  # a thousand patterns that each process would compile for its first model
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")

import_module("torch").set_num_threads(1)
gc.freeze()  # a collection in a child does not copy what all share
gc.enable()
