"""A plugin of vLLM: serves n:m sparse and rounded models on a CPU by castlm's kernels."""


def register() -> None:
    """Adds the quantization method "castlm" to vLLM, which calls this in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from castlm_vllm.quantization import CastlmConfig

    register_quantization_config("castlm")(CastlmConfig)
