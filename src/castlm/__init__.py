"""From a dense language model to an n:m sparse one by continued training. The public names, imported when asked for.

`__init__.pyi` lists the same names for editors and type checkers, and a test holds the two equal.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
    "castlm.api.evaluate": ("Evaluation", "evaluate"),
    "castlm.api.generate": ("generate",),
    "castlm.api.objects": ("Result",),
    "castlm.api.pack": ("pack", "unpack"),
    "castlm.api.prune": ("prune",),
    "castlm.api.quantize": ("quantize",),
    "castlm.api.sample": ("sample",),
    "castlm.api.train": ("finetune", "train"),
    "castlm.core.adams": ("AdamS",),
    "castlm.core.decay": ("decay_budget",),
    "castlm.core.distill": ("OutputHead", "TopTokens", "distillation_loss", "top_tokens"),
    "castlm.core.errors": ("DivergedError", "InputError"),
    "castlm.core.experts": ("linearize_experts_",),
    "castlm.core.nm": (
        "NM",
        "Pattern",
        "count_nm_violations",
        "flip_rate",
        "is_nm_sparse",
        "nm_mask",
        "sparse_weight_ratio",
    ),
    "castlm.core.scaling": ("add_weight_scaling", "fold_weight_scaling"),
    "castlm.core.sparsify": (
        "is_sparse_linear",
        "prune_",
        "sparse_linears",
        "sparse_param_groups",
        "weight_parameter",
    ),
    "castlm.data.calibration": ("draw_calibration",),
    "castlm.evaluation.perplexity": ("perplexity",),
    "castlm.export.hf": ("export_model",),
    "castlm.export.packed": ("pack_folder", "unpack_folder"),
    "castlm.export.verify": ("verify",),
    "castlm.facts": ("Facts",),
    "castlm.methods.adapters": ("PatternCallback", "keep_pattern_", "shira_config"),
    "castlm.methods.callback": ("CastCallback", "CastTrainer"),
    "castlm.models.io": ("load_model", "save_model"),
    "castlm.oneshot.draw": ("calibration_length",),
    "castlm.oneshot.methods": ("prune_oneshot_",),
    "castlm.oneshot.options": ("BasisOptions", "Refinements"),
    "castlm.patterns": ("parse_pattern",),
    "castlm.packed.layers": ("pack_model_",),
    "castlm.packed.register": ("register",),
    "castlm.packed.semi_structured": ("to_semi_structured_",),
    "castlm.signals": ("Interrupted",),
    "castlm.structured.cut": ("cut_units",),
    "castlm.training.config": ("FinetuneConfig", "TrainConfig"),
}
"""The public names by their modules."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'castlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
