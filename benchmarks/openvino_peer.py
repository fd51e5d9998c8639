"""OpenVINO, for the frontier's rows of it: makes a model of a Hugging Face folder and answers requests, one a line.

    pip install openvino nncf optimum-intel                     # in an environment of its own, whose Python runs this
    python benchmarks/openvino_peer.py make FOLDER OUT          # writes OUT/sizes.json, bytes of the weights by format
    python benchmarks/openvino_peer.py answer FOLDER THREADS    # reads requests, prints answers, both JSON

`benchmarks.frontier` runs it. optimum-intel wants another transformers than castlm, so this file imports nothing of
castlm. A request is {"format": a name of FORMATS, "what": "decode", "read", "batch" or "perplexity", "ids": lists of
tokens} and for some "new_tokens" or "seq_len". The answer has seconds by clock, or the perplexity. Activations are
fp32, and OpenVINO rounds them to int8 in groups before a product with integers ("dynamic quantization").
"""

from __future__ import annotations

import json
import math
import os
import sys
import time

import numpy as np
import openvino as ov

FORMATS = {
    "int8": ("int8_asym", {}, 32),
    "int8, activations in groups of 128": ("int8_asym", {}, 128),
    "int4": ("int4_sym", {"group_size": 64, "ratio": 1.0}, 64),
    "int4 with zero points": ("int4_asym", {"group_size": 64, "ratio": 1.0}, 64),
}
"""By name: the mode of nncf, its options, and the activations that share a scale. Embedding and head are int8."""


def make(folder: str, out: str) -> None:
    """Writes fp32, every mode, and the bytes of the weights by format."""
    import nncf
    from optimum.intel import OVModelForCausalLM

    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(
        f"{out}/fp32"
    )
    sizes = {}
    for mode, options, _ in FORMATS.values():
        if mode in sizes:
            continue
        model = ov.Core().read_model(f"{out}/fp32/openvino_model.xml")
        model = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode.upper()), **options)
        os.makedirs(f"{out}/{mode}", exist_ok=True)
        ov.save_model(model, f"{out}/{mode}/openvino_model.xml", compress_to_fp16=False)
        sizes[mode] = os.path.getsize(f"{out}/{mode}/openvino_model.bin")
    with open(f"{out}/sizes.json", "w") as file:
        json.dump({name: sizes[mode] for name, (mode, _, _) in FORMATS.items()}, file)


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

    def __init__(self, folder: str, name: str, threads: int, all_logits: bool = False):
        mode, _, group = FORMATS[name]
        core = ov.Core()
        model = core.read_model(f"{folder}/{mode}/openvino_model.xml")
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
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

    def decode(self, ids: np.ndarray, new_tokens: int) -> None:
        logits = self.step(ids)
        for _ in range(new_tokens - 1):
            logits = self.step(np.array([[logits[0, -1].argmax()]]))

    def perplexity(self, ids: np.ndarray, seq_len: int) -> float:
        """As `LlamaCpp.perplexity`: sequences side by side, all tokens but the first of each scored."""
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, seq_len):
            sequence = ids[start : start + seq_len]
            self.reset()
            logits = self.step(sequence[None])[0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            scores = logits[np.arange(len(logits)), sequence[1:]] - np.log(np.exp(logits).sum(-1))
            total, count = total - scores.sum(), count + len(scores)
        return math.exp(total / count)


def answer(folder: str, threads: int) -> None:
    runners: dict[str, Runner] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, what, ids = request["format"], request["what"], np.array(request["ids"], np.int64)
        if what == "perplexity":
            found = {"perplexity": Runner(folder, name, threads, all_logits=True).perplexity(ids, request["seq_len"])}
        else:
            if name not in runners:
                runners[name] = Runner(folder, name, threads)
            runner = runners[name]
            runner.reset()
            wall, cpu = time.perf_counter(), time.process_time()
            if what == "decode":
                runner.decode(ids, request["new_tokens"])
            else:
                runner.step(ids)
            found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(*sys.argv[2:4])
    else:
        answer(sys.argv[2], int(sys.argv[3]))
