"""From a dense language model to an n:m sparse one by continued training. The public names, imported when asked for.

Importing castlm also lets transformers load packed folders: see `castlm.runtime.register`.
"""

import importlib

from castlm.runtime.register import register

__version__ = "0.1.0"

_HOME = {
    "castlm.core.adams": ("AdamS",),
    "castlm.core.decay": ("decay_budget",),
    "castlm.core.distill": ("OutputHead", "TopTokens", "distillation_loss", "top_tokens"),
    "castlm.core.errors": ("InputError",),
    "castlm.core.experts": ("linearize_experts_",),
    "castlm.core.nm": (
        *("NM", "Pattern", "count_nm_violations", "flip_rate", "is_nm_sparse", "nm_mask", "sparse_weight_ratio"),
    ),
    "castlm.core.scaling": ("add_weight_scaling", "fold_weight_scaling"),
    "castlm.core.sparsify": ("is_sparse_linear", "prune_", "sparse_linears", "sparse_param_groups"),
    "castlm.evaluation.perplexity": ("perplexity",),
    "castlm.export.hf": ("export_model",),
    "castlm.export.packed": ("pack_folder", "unpack_folder"),
    "castlm.export.verify": ("verify",),
    "castlm.runtime.layers": ("pack_model_",),
    "castlm.runtime.semi_structured": ("to_semi_structured_",),
    "castlm.methods.adapters": ("PatternCallback", "keep_pattern_", "shira_config"),
    "castlm.models.io": ("load_model", "save_model"),
    "castlm.patterns": ("parse_pattern",),
    "castlm.training.config": ("FinetuneConfig", "TrainConfig"),
    "castlm.training.train": ("train",),
}
register()
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'castlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
