"""Weight scaling, forward and backward, against the same layers without it: one layer, and a model's whole pass.

A full training step of castlm is a forward and backward pass of the student, a forward pass of the teacher and the
optimizer; what scaling adds is set against the student's share alone, which is the harder test.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rows import Row, interleaved, ratio_row
from castlm.core.scaling import add_weight_scaling


def rows(quick: bool, repeats: int = 5, clock: str = "wall") -> list[Row]:
    tokens, layers, vocab = (256, 1, 4096) if quick else (1024, 6, 49_152)
    return [layer_row(tokens, repeats + 2, clock), model_row(tokens, layers, vocab, repeats, clock)]


def layer_row(tokens: int, repeats: int, clock: str, shape: tuple[int, int] = (1536, 576)) -> Row:
    """One linear layer (out, in), fp32."""
    plain = nn.ModuleDict({"0": nn.Linear(shape[1], shape[0], bias=False)})
    scaled = nn.ModuleDict({"0": nn.Linear(shape[1], shape[0], bias=False)})
    add_weight_scaling(scaled)
    x = torch.randn(tokens, shape[1], requires_grad=True)
    out_grad = torch.randn(tokens, shape[0])

    def run(layer: nn.Module) -> None:
        layer(x).backward(out_grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    times = interleaved({"castlm": lambda: run(scaled["0"]), "plain": lambda: run(plain["0"])}, repeats, clock)
    part = f"weight scaling, one layer {shape[0]} x {shape[1]}, {tokens} tokens"
    bound = f"two passes over W each way against {3 * tokens} multiplications a weight"
    return ratio_row(part, "the layer without it", times["castlm"], times["plain"], "", bound=bound)


def model_row(tokens: int, layers: int, vocab: int, repeats: int, clock: str) -> Row:
    """Forward and backward pass of a LLaMA as wide as SmolLM2-135M, fp32; fewer layers, the same per layer."""

    def model(scale: bool) -> LlamaForCausalLM:
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": vocab}
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
        if scale:
            add_weight_scaling(made)
        return made

    input_ids = torch.randint(vocab, (tokens // 128, 128), generator=torch.Generator().manual_seed(0))
    scaled, plain = model(True), model(False)
    times = interleaved(
        {"castlm": lambda: step(scaled, input_ids), "plain": lambda: step(plain, input_ids)}, repeats, clock
    )
    part = f"weight scaling, forward + backward of {layers} of 30 layers and the head, {tokens} tokens"
    return ratio_row(part, "the model without it", times["castlm"], times["plain"], "<= 1.03")


def step(model: LlamaForCausalLM, input_ids: Tensor) -> None:
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
