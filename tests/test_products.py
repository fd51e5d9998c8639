"""The axis along which a model multiplies by a weight, compared with a counter in a forward pass with values."""

import json
from collections import defaultdict
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from castlm.cli.main import main
from castlm.core.blocks import in_block, is_router
from castlm.export.verify import verify
from castlm.models.products import uses_of
from tests.runs import edit_json
from tests.slow import slow
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def dbrx() -> PreTrainedModel:
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 264}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("dbrx", ffn_config=ffn, attn_config=attention, **sizes), dtype=torch.float32
    )


def jetmoe() -> PreTrainedModel:
    sizes = {**SIZES, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48}
    config = AutoConfig.for_model("jetmoe", **sizes, num_local_experts=4, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def step3p7() -> PreTrainedModel:
    """A vision-language model whose first block has experts, and whose second has none."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "share_expert_dim": 16}
    heads = {"num_key_value_heads": 2, "num_sliding_attention_heads": 4, "head_dim": 8, "sliding_window": 16}
    text = {**SIZES, **experts, **heads, "intermediate_size": 64, "pad_token_id": 0, "moe_layers_enum": [0]}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "step3p7", text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


MODELS = {"dbrx": dbrx, "jetmoe": jetmoe, "step3p7": step3p7}
OVER: dict[str, dict[str, Any]] = {
    "llama4_text": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    "longcat_flash": {"zero_expert_num": 0},  # experts without weights, for which the file has some that no pass reads
}


def random_model(family: str) -> PreTrainedModel:
    """A tiny model, about half of whose weights are zeros at random places."""
    model = MODELS[family]() if family in MODELS else tiny_model(family, **OVER.get(family, {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.mul_(torch.rand(parameter.shape, generator=generator) > 0.5)
    return model.eval()


class Counter(TorchDispatchMode):
    """Counts groups of 4 with more than 2 non-zeros in the operands of products that are views of a parameter."""

    OPERANDS: ClassVar = {"mm": (1, 0), "addmm": (2, 0), "bmm": (1, 1), "baddbmm": (2, 1)}
    """The second factor of each product, and the axis that its sum runs over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.counts: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.OPERANDS.get(function.overloadpacket.__name__)
        if found is not None:
            operand: Tensor = args[found[0]]
            if (name := self.names.get(operand.untyped_storage().data_ptr())) is not None:
                groups = operand.movedim(found[1], -1).unflatten(-1, (-1, 4)).count_nonzero(-1)
                self.counts[name][operand.data_ptr()] = (groups.numel(), int((groups > 2).sum()))
        return function(*args, **(kwargs or {}))


def counted(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Groups and violations of each weight of the transformer blocks in a forward pass, without routers."""
    if model.config.model_type != "gpt2":
        model.set_experts_implementation("eager")
    counter = Counter(model)
    ids = torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), counter:
        model(input_ids=ids, use_cache=False)
    names = [name for name in counter.counts if in_block(name) and not is_router(name.removesuffix(".weight"))]
    return {name: tuple(map(sum, zip(*counter.counts[name].values()))) for name in names}  # type: ignore[misc]


@pytest.mark.parametrize(
    "family",
    [
        *("gpt_oss", "dbrx", "jetmoe", "inkling_text", "step3p7", "mixtral", "gpt2"),
        *map(
            slow, ("phi3", "qwen2_moe", "aria_text", "granitemoe", "granitemoeshared", "llama4_text", "longcat_flash")
        ),
        *map(slow, ("olmoe", "qwen3_moe", "glm4_moe", "opt", "gemma2")),
    ],
)
def test_verify_counts_what_a_forward_pass_multiplies_by(family, tmp_path):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    report = verify(tmp_path)
    expected = counted(model).values()
    assert not report.uncounted
    assert sum(layer.num_groups for layer in report.layers) == sum(groups for groups, _ in expected) > 0
    assert sum(layer.num_violations for layer in report.layers) == sum(bad for _, bad in expected) > 0


@pytest.mark.parametrize("family", ["mixtral", "step3p7"])
def test_no_entry_of_a_config_turns_the_axis(family, tmp_path):
    """Nor a family that another entry names."""
    random_model(family).save_pretrained(tmp_path)
    before = verify(tmp_path).totals()
    edit_json(tmp_path / "config.json", note={"model_type": "gpt_oss"}, text={"model_type": "gpt2"})
    assert verify(tmp_path).totals() == before


def test_weights_that_stay_dense_are_refused_and_said(tmp_path, capsys):
    save_tiny(tmp_path / "dense", "deepseek_v4")
    command = ["prune", "--model", str(tmp_path / "dense"), "--output-dir", str(tmp_path / "out")]
    command += ["--solver", "magnitude"]
    assert main(command) == 1
    assert "allow_dense 0.15" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--allow-dense", "0.2"]) == 0
    assert "2:4 in 8" in capsys.readouterr().out.splitlines()[0]
    assert main(["verify", str(tmp_path / "out")]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    share = verify(tmp_path / "out").share
    assert f"{share:.2%}" in first
    assert f"{share:.2%}" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "castlm.json").read_text())["proof"]["share"] == share


class Odd(nn.Module):
    """Weights in uses that are told from each other."""

    def __init__(self) -> None:
        super().__init__()
        made = ("out_in", "in_out", "both", "scale", "table", "squared", "unused", "merged", "normed")
        for name in made:
            setattr(self, name, nn.Parameter(torch.randn(8, 8)))
        self.stacked = nn.Parameter(torch.randn(4, 8, 8))
        self.linear, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = torch.nn.functional.embedding(input_ids, self.table)[0]  # (tokens, 8)
        x = x @ self.out_in.T + x @ self.in_out + x @ self.both + x @ self.both.T
        x = x * self.scale[0] + self.called(x) + (x @ self.linear.weight.T)
        x = x + x @ (self.normed / self.normed.norm(dim=-1, keepdim=True)).T
        merged = self.merged.view(2, 4, 8)[1]  # two experts (4, 8), end to end
        x = x + (x @ merged.T) @ merged
        chosen = (x.sum(-1) > 0).long() % 4
        x = x + torch.bmm(x[:, None], self.stacked[chosen])[:, 0]
        return x + torch.linalg.matrix_exp(self.squared)[0]


def test_uses_are_told_from_each_other():
    with torch.device("meta"):
        model = Odd()
    uses = uses_of(model)
    axes = {name: use.axis for name, use in uses.items() if use.axis is not None}
    assert axes == {
        **dict.fromkeys(("out_in", "linear.weight", "called.weight", "normed"), -1),
        **dict.fromkeys(("in_out", "stacked"), -2),
    }
    assert {name for name, use in uses.items() if not use.is_known} == {"both", "merged", "squared", "unused"}
    assert uses["called.weight"].is_called
    assert not uses["linear.weight"].is_called
    assert (uses["scale"].is_known, uses["table"].is_known) == (True, True)


def test_a_layer_that_no_text_reaches_is_called_by_itself():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.Linear(8, 4)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            return input_ids

    with torch.device("meta"):
        model = Model()
    assert uses_of(model)["cross.weight"].axis == -1


def test_a_matrix_of_experts_end_to_end_has_the_width_of_one():
    with torch.device("meta"):
        model = dbrx()
    uses = uses_of(model)
    w2 = next(use for name, use in uses.items() if name.endswith("w2"))
    assert (w2.axis, w2.width) == (-2, 48)


@pytest.mark.slow
def test_every_causal_family_is_understood():
    """On its default config, of any size, without memory for its weights. What is not understood is a convolution."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    num_understood = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family]())
        except Exception:  # a default config that makes no model
            continue
        unknown = {name for name, use in uses_of(model).items() if in_block(name) and not use.is_known}
        num_understood += not unknown
    assert num_understood >= 150
