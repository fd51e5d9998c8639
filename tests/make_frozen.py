"""Writes the frozen packed folders of runtime/tests: python -m tests.make_frozen FOLDER.

They were made once and are never made again: castlm-runtime must read them as long as it reads their format. Each has a
tiny LLaMA in one format, `ids.json`, and `logits.safetensors`, its logits by dense layers in fp32.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

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


@torch.no_grad()
def freeze(folder: Path, values: str, n: int, m: int, head: str) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=16, num_hidden_layers=1)
    stored, specs = {}, {}
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        is_layer = ".layers." in name and parameter.dim() == 2
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
        specs[stem] = packed.spec
        stored |= {f"{stem}.{suffix}": tensor.contiguous() for suffix, tensor in packed.tensors().items()}
        parameter.copy_(unpack(packed, torch.float32))
    folder.mkdir(parents=True)
    save_file(stored, folder / "castlm.safetensors", metadata=to_metadata(specs))
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = (
        *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("hidden_act", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    )
    config = {key: config[key] for key in kept} | {"architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "weights": "castlm.safetensors"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "ids.json").write_text(json.dumps(IDS) + "\n")
    tiny_tokenizer().save_pretrained(folder)
    save_file({"logits": model(torch.tensor([IDS])).logits[0].float()}, folder / "logits.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        freeze(Path(sys.argv[1]) / name, *case, head="int6" if name == "int6-head" else "int8")
