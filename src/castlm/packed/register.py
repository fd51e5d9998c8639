"""Lets transformers load packed folders.

transformers has no entry point for quantizers, only a table. castlm's own functions call `register` when they load a
model; who calls `from_pretrained` of transformers with a packed folder calls it first.
"""

from __future__ import annotations


def register() -> None:
    """Adds castlm's packed format to the quantizers of transformers; may be repeated.

    Examples:
        >>> import castlm
        >>> castlm.register()
        >>> model = AutoModelForCausalLM.from_pretrained("packed")  # doctest: +SKIP
    """
    from transformers.quantizers import auto

    from castlm.packed.quantizer import CastlmConfig, CastlmQuantizer
    from castlm_runtime.stored import QUANT_METHOD

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(CastlmConfig)
        auto.register_quantizer(QUANT_METHOD)(CastlmQuantizer)
