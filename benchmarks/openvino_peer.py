"""OpenVINO, for the frontier's rows of it: see `peer.py`.

    pip install openvino nncf optimum-intel                     # in an environment of its own, whose Python runs this

optimum-intel wants another transformers than castlm. Activations of fp32 are rounded by OpenVINO to int8 in groups
before a product with integers ("dynamic quantization"). Keys and values are kept as u8.
"""

from __future__ import annotations

import json
import os

import numpy as np
import openvino as ov

from benchmarks.peer import main

FORMATS = {
    "int8": ("int8_asym", {}, 32, "f32"),
    "int8, activations in groups of 128": ("int8_asym", {}, 128, "f32"),
    "int4": ("int4_sym", {"group_size": 64, "ratio": 1.0}, 64, "f32"),
    "int4 in bf16": ("int4_sym", {"group_size": 64, "ratio": 1.0}, 64, "bf16"),
    "int4 with zero points": ("int4_asym", {"group_size": 64, "ratio": 1.0}, 64, "f32"),
}
"""By name: the mode of nncf, its options, the activations that share a scale, and the dtype of all else: OpenVINO's own
choice is bf16 where the processor has it. Embedding and head are int8.
"""


def make(folder: str, out: str) -> None:
    """Writes fp32, every mode, and the bytes of the weights by format."""
    import nncf
    from optimum.intel import OVModelForCausalLM

    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(
        f"{out}/fp32"
    )
    sizes = {}
    for mode, options, *_ in FORMATS.values():
        if mode in sizes:
            continue
        model = ov.Core().read_model(f"{out}/fp32/openvino_model.xml")
        model = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode.upper()), **options)
        os.makedirs(f"{out}/{mode}", exist_ok=True)
        ov.save_model(model, f"{out}/{mode}/openvino_model.xml", compress_to_fp16=False)
        sizes[mode] = os.path.getsize(f"{out}/{mode}/openvino_model.bin")
    with open(f"{out}/sizes.json", "w") as file:
        json.dump({name: sizes[mode] for name, (mode, *_) in FORMATS.items()}, file)


def with_last_logits(model: ov.Model) -> ov.Model:
    """Makes the head multiply the last position alone, as castlm reads prompts."""
    from openvino import opset13 as op

    node = next(output for output in model.outputs if "logits" in output.get_names()).node
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).node
    bounds = (np.array([number]) for number in (-1, 2**31 - 1, 1, 1))  # of axis 1, from the last on
    node.input(0).replace_source_output(op.slice(node.input_value(0), *bounds).output(0))
    model.validate_nodes_and_infer_types()
    return model


class Runner:
    """One format of the model, ready to run."""

    def __init__(self, folder: str, name: str, threads: int, all_logits: bool):
        mode, _, group, precision = FORMATS[name]
        core = ov.Core()
        model = core.read_model(f"{folder}/{mode}/openvino_model.xml")
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
            "KV_CACHE_PRECISION": "u8",
        }
        compiled = core.compile_model(model if all_logits else with_last_logits(model), "CPU", options)
        self.request = compiled.create_infer_request()
        self.names = {name for put in compiled.inputs for name in put.get_names()}
        self.length = 0

    def reset(self) -> None:
        self.request.reset_state()
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """The logits of new tokens (sequences, tokens), after those since `reset`."""
        rows, tokens = ids.shape
        until = self.length + tokens
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, until), np.int64),
            "position_ids": np.tile(np.arange(self.length, until), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in values.items() if name in self.names})
        self.length = until
        return self.request.get_tensor("logits").data


if __name__ == "__main__":
    main(make, Runner)
