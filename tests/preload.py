"""What the server of `tests.ranks` imports once for all ranks. It starts no thread: its children are forks."""

import contextlib
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: F401
import torch
import transformers.models.gemma.modeling_gemma
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import castlm.training.loop  # noqa: F401

with contextlib.suppress(ImportError):  # a thousand patterns that each process would compile for its first model
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
with contextlib.suppress(ImportError):
    import peft  # noqa: F401
with contextlib.suppress(ImportError):
    import torch.utils.tensorboard

torch.set_num_threads(1)
gc.freeze()  # a collection in a child does not copy what all share
