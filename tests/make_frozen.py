"""Writes the frozen packed folders of runtime/tests: python -m tests.make_frozen FOLDER.

They were made once and are never made again: castlm-runtime must read them as long as it reads their format. Each has a
tiny model in one format, `ids.json`, and `logits.safetensors`, its logits by dense layers in fp32. Most are LLaMA; two
have experts, Qwen3-MoE one by one, and Mixtral stacked as transformers has them in memory.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from castlm.core.nm import NM
from castlm.dtypes import FLOATS
from castlm.formats.rounding import round_rows
from castlm.packed.tensor import cast_weight, pack, pack_integers, unpack
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import to_metadata
from castlm_runtime.stored import QUANT_METHOD
from tests.tiny import tiny_model, tiny_tokenizer

CASES = {
    "bf16-2of4": ("bf16", 2, 4),
    "fp16-4of8": ("fp16", 4, 8),
    "fp32-3of4": ("fp32", 3, 4),
    "int8-32of64": ("int8", 32, 64),
    "int4-2of4": ("int4", 2, 4),
    "int3-8of16": ("int3", 8, 16),
    "int4-dense": ("int4", 0, 0),
    "int6-head": ("int4", 32, 64),
}
EXPERTS = {"int4-experts": ("qwen3_moe", "int4", 2, 4), "bf16-experts": ("mixtral", "bf16", 2, 4)}
IDS = [5, 80, 200, 13, 99, 100, 7, 31, 64, 2, 250, 17]


def rounded(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight, rounded to the nearest."""
    form = FORMATS[kind]
    if not form.group:
        found = round_rows(weight, kind)
        return found.codes, found.scales
    groups = weight.view(len(weight), -1, form.group)  # (64, 1, 64)
    scales = (groups.abs().amax(-1) / form.largest).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-form.largest, form.largest)
    return codes.view_as(weight).to(torch.int8), scales


def stored_views(name: str, parameter: Tensor, family: str) -> Iterator[tuple[str, int, Tensor]]:
    """The stored tensors of a parameter: (name, experts in it, its values, which may be written)."""
    if parameter.dim() < 3:
        yield name, 0, parameter
    elif family == "mixtral":
        yield name, len(parameter), parameter.view(-1, parameter.shape[2])
    else:
        at, _, projection = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for e, expert in enumerate(parameter):
            for part, weight in zip(parts, expert.chunk(len(parts))):
                yield f"{at}.{e}.{part}.weight", 0, weight


@torch.no_grad()
def freeze(folder: Path, values: str, n: int, m: int, head: str, family: str = "llama") -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    model = tiny_model(family, **sizes | ({"moe_intermediate_size": 64} if family == "qwen3_moe" else {}))
    stored, specs = {}, {}
    views = (view for name, parameter in model.named_parameters() for view in stored_views(name, parameter, family))
    for name, experts, parameter in views:
        stem = name.removesuffix(".weight")
        is_layer = ".layers." in name and parameter.dim() == 2 and not name.endswith("mlp.gate.weight")
        if not is_layer and not name.startswith(("model.embed_tokens", "lm_head")):
            stored[name] = parameter.to(torch.bfloat16)
            parameter.copy_(stored[name])
            continue
        kind, weight = (values if is_layer else head), parameter.detach()
        if is_layer and m:
            weight = weight * NM(n, m).mask(weight)
        if FORMATS[kind].rounds:
            codes, scales = rounded(weight, kind)
            packed = pack_integers(codes, scales, kind, *((n, m) if is_layer else (0, 0)))
        else:
            packed = pack(cast_weight(weight, FLOATS[kind]), n, m)
        specs[stem] = replace(packed.spec, experts=experts)
        stored |= {f"{stem}.{suffix}": tensor.contiguous() for suffix, tensor in packed.tensors().items()}
        parameter.copy_(unpack(packed, torch.float32))
    folder.mkdir(parents=True)
    save_file(stored, folder / "castlm.safetensors", metadata=to_metadata(specs))
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = (
        *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("hidden_act", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    )
    config = {key: config[key] for key in kept if key in config} | {"architectures": [type(model).__name__]}
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "weights": "castlm.safetensors"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "ids.json").write_text(json.dumps(IDS) + "\n")
    tiny_tokenizer().save_pretrained(folder)
    save_file({"logits": model(torch.tensor([IDS])).logits[0].float()}, folder / "logits.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        freeze(Path(sys.argv[1]) / name, *case, head="int6" if name == "int6-head" else "int8")
    for name, (family, *form) in EXPERTS.items():
        freeze(Path(sys.argv[1]) / name, *form, head="int8", family=family)
