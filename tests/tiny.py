"""Tiny models in memory, one of each family, with no weight left at a value that would hide a mistake (0 or 1)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from castlm.core.sparsify import prune_
from castlm.models.architecture import linearize_

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt2")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
"""Families whose blocks hold 4 experts, 2 of them for each token; those of gpt_oss are stored (experts, in, out)."""

VISION = ("llava", "qwen2_vl", "qwen3_vl")
"""Vision-language models: a language model beside a vision tower and a projector. The positions of the second depend on
its images, and the third adds their features between its blocks as well."""

EOS = "<|endoftext|>"
EOS_ID = 256  # after one token for each byte
VOCAB_SIZE = 264

TEXT = "\n\n".join(f"Story {i}: " + " ".join(chr(97 + (i * j) % 26) * 3 for j in range(60)) for i in range(60))
"""A few stories, one document."""

_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,  # else the embedding of that token gets no gradient
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
_KV_HEADS = {"num_key_value_heads": 2}
_GRANITE = _KV_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
_SHARED_EXPERTS = {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPED_EXPERTS = _EXPERTS | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
_STATES = {"state_size": 8, "time_step_rank": 8}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_ROPE_OF_IMAGES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS | {"num_local_experts": 4},
    "qwen2_moe": _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16},
    "llava": _GROUPED | {"model_type": "llama"},
    "qwen2_vl": {"num_key_value_heads": 2, "rope_parameters": _ROPE_OF_IMAGES},
    "qwen3_vl": _GROUPED | {"rope_parameters": _ROPE_OF_IMAGES},
    "gpt_oss": _EXPERTS | {"num_local_experts": 4, "sliding_window": 16},
    "aria_text": _GROUPED | {"moe_num_experts": 4, "moe_topk": 2},
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE | {"shared_intermediate_size": 48},
    "granitemoehybrid": _GRANITE | {"shared_intermediate_size": 48, "layer_types": ["mamba", "attention"], **_MAMBA},
    **dict.fromkeys(("glm4_moe", "dots1"), _GROUPED_EXPERTS | _SHARED_EXPERTS),
    "olmoe": _KV_HEADS | {"num_experts": 4, "num_experts_per_tok": 2},
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "ministral3", "qwen3", "smollm3", "seed_oss", "ernie4_5"), _GROUPED
    ),
    **dict.fromkeys(("helium", "hunyuan_v1_dense", "cwm", "vaultgemma", "exaone4", "arcee", "apertus"), _GROUPED),
    **dict.fromkeys(("ernie4_5", "nemotron", "glm", "glm4", "gemma2", "gemma3_text"), _GROUPED),
    **dict.fromkeys(("qwen2", "stablelm", "starcoder2"), _KV_HEADS),
    **dict.fromkeys(("cohere", "cohere2", "granite", "olmo2", "olmo3", "phi"), _KV_HEADS),
    "phi3": _KV_HEADS | {"pad_token_id": 0},
    "gemma": _GROUPED | {"tie_word_embeddings": True},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "jetmoe": _KV_HEADS | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": _GROUPED | {"num_local_experts": 4, "intermediate_size_mlp": 48},
    "longcat_flash": _LATENT
    | {"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "deepseek_v4": _LATENT
    | {
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3},
        **{"num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 16},
        **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    },
    "inkling_text": _GROUPED
    | {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 16},
        **{"d_rel": 4, "rel_extent": 64},
    },
    "exaone": _GROUPED,
    "mamba": _STATES,
    "falcon_mamba": _STATES,
    "lara_mini": _EXPERTS
    | {
        **{"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": 16},
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    },
    "sarvam_moe": _GROUPED_EXPERTS | _SHARED_EXPERTS,
    "opt": {"word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_QWEN_TOKENS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
_IMAGES: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_TOWER},
        "image_token_index": 260,
    },
    "qwen2_vl": {
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **_QWEN_TOKENS,
    },
}
_OWN_NAMES = {
    "opt": {"intermediate_size": "ffn_dim"},
    "longcat_flash": {"intermediate_size": "ffn_hidden_size", "num_hidden_layers": "num_layers"},
    "dbrx": {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    "gpt2": {
        "intermediate_size": "n_inner",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
}


def tiny_model(family: str, seed: int = 0, **over: Any) -> PreTrainedModel:
    """A fp32 causal LM of `family` in eval mode: 2 layers, hidden 32, vocabulary 264, context 256.

    Args:
        family: one of FAMILIES, or another `model_type` of transformers.
        over: config fields in LLaMA's names, as `intermediate_size=90`, or the family's own.
    """
    fields = _WIDTHS | _FAMILY.get(family, {}) | over
    own = _OWN_NAMES.get(family, {})
    of_text = {own.get(name, name): value for name, value in fields.items()}
    config = AutoConfig.for_model(
        family, **({"text_config": of_text, **_IMAGES[family]} if family in VISION else of_text)
    )
    auto = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() == 1:  # norms and biases, all ones or zeros until here
                    param.add_(torch.randn_like(param), alpha=0.1)
                else:
                    param.normal_(std=0.15)
    return model.eval()


def linear_model(family: str, **over: Any) -> PreTrainedModel:
    """`tiny_model` made of layers, as `castlm.load_model` loads it: `nn.Linear`, and `ExpertLinear` of experts."""
    model = tiny_model(family, **over)
    linearize_(model)
    return model


def sparse_model(**over: Any) -> PreTrainedModel:
    """A tiny LLaMA at 2:4."""
    model = tiny_model("llama", **over)
    prune_(model)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, ids 0..255 in the order of its symbol, and an end-of-text: any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def save_tiny(folder: str | Path, family: str = "llama", seed: int = 0, **over: Any) -> Path:
    """Writes `tiny_model` and `tiny_tokenizer` as a Hugging Face folder and returns it."""
    tiny_model(family, seed, **over).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


IMAGE_TOKENS = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "qwen3_vl": "<|image_pad|>"}
"""The placeholder of an image in a text: token 260 in all three."""
IMAGE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Renders lists of parts alone, as the templates of many processors do. IMAGE is for the token of an image."""


def save_tiny_with_images(folder: str | Path, family: str = "llava", seed: int = 0, **over: Any) -> Path:
    """Writes a model of VISION with its processor; an image takes 4 tokens. Returns the folder."""
    import transformers

    tokenizer, token = tiny_tokenizer(), IMAGE_TOKENS[family]
    names = ["<a>", "<b>", "<c>", token, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names[:4] if family == "llava" else names})
    assert tokenizer.convert_tokens_to_ids(token) == 260
    if family == "llava":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        of_model = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        template = IMAGE_TEMPLATE.replace("IMAGE", token)
        processor = transformers.LlavaProcessor(images, tokenizer, chat_template=template, **of_model)
    else:
        images = transformers.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=1024)
        template = IMAGE_TEMPLATE.replace("IMAGE", f"<|vision_start|>{token}<|vision_end|>")
        name = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL"}[family]
        videos = getattr(transformers, f"{name}VideoProcessor")(patch_size=8)
        processor = getattr(transformers, f"{name}Processor")(images, tokenizer, videos, chat_template=template)
    processor.save_pretrained(folder)
    tiny_model(family, seed, **over).save_pretrained(folder)
    return Path(folder)


def write_gguf(file: Path, model: PreTrainedModel, embedding: str = "Q8_0") -> dict[str, torch.Tensor]:
    """`model`, a tiny LLaMA, as llama.cpp stores it, matrices in Q8_0; returns the weights that must come out again."""
    import pytest

    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    vocab = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "zz", *(f"<unused{i}>" for i in range(EOS_ID + 2, VOCAB_SIZE))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == EOS_ID else 1 for i in range(VOCAB_SIZE)])
    writer.add_token_merges(["z z"])
    writer.add_bos_token_id(EOS_ID)
    writer.add_eos_token_id(EOS_ID)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = {}
    for name, tensor in model.state_dict().items():
        weight, kind = tensor.numpy(), name.split(".")[-2]
        if kind in heads:  # llama.cpp's rotary pairs are neighbours
            weight = weight.reshape(heads[kind], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 1:
            writer.add_tensor(target, weight)
            expected[name] = tensor
            continue
        form = gguf.GGMLQuantizationType[embedding] if target == "token_embd.weight" else q8
        quantized = gguf.quants.quantize(np.ascontiguousarray(weight), form)
        writer.add_tensor(target, quantized, raw_dtype=form)
        weight = gguf.quants.dequantize(quantized, form)
        if kind in heads:
            weight = weight.reshape(heads[kind], -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        expected[name] = torch.tensor(weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
