"""The calls of `castlm.api`: their options are those of the commands."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import castlm
from castlm.core.errors import InputError
from tests import keywords
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_the_typed_keywords_are_the_fields_of_the_options():
    assert keywords.FILE.read_text() == keywords.source(), "python -m tests.keywords writes it again"


def test_signatures_at_run_time_have_the_options_with_their_defaults():
    for name, default in {"train": ("eta", 2 / 3), "prune": ("damping", 0.01), "pack": ("head", None)}.items():
        assert inspect.signature(getattr(castlm, name)).parameters[default[0]].default == default[1]
    assert "init_from" not in inspect.signature(castlm.finetune).parameters
    assert "lora_r" not in inspect.signature(castlm.train).parameters


def test_the_stub_for_editors_has_the_public_names():
    stub = (ROOT / "src" / "castlm" / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r"^from (castlm\.\S+) import (\w+) as (\w+)$", stub, re.M)
    assert {name: module for module, name, _ in listed} == castlm._MODULE_OF
    assert all(name == alias for _, name, alias in listed)


def test_every_public_name_is_there():
    for name in castlm.__all__:
        assert getattr(castlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        castlm.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: castlm.train("m", "t", "o", learning_rat=1), "learning_rate"),
        (lambda: castlm.train("m", "t"), "output_dir"),
        (lambda: castlm.train(castlm.TrainConfig.of("m", "t", "o"), "t"), "config alone"),
        (lambda: castlm.prune("m", output_dir="o"), "give calibration FILE, or method magnitude"),
        (
            lambda: castlm.prune("m", "t", output_dir="o", method="magnitude"),
            "calibration = t has an effect only with a method",
        ),
        (lambda: castlm.evaluate("m"), "give text FILE, tasks"),
        (lambda: castlm.evaluate("m", tasks="piqa", seq_len=8), "seq_len = 8 has an effect only with a text"),
        (lambda: castlm.pack("m", output_dir="o", head="int9"), "int9"),
        (lambda: castlm.finetune("demo", "t", "o"), "demo is a dense model"),
    ],
)
def test_bad_calls_name_the_value_as_python_writes_it(call, named):
    with pytest.raises(InputError, match=named):
        call()


@pytest.mark.slow  # mypy reads torch
def test_a_type_checker_sees_every_option(tmp_path):
    calls = ['castlm.train("m", "t", "o", max_steps=2)', 'castlm.pack("m", output_dir="o").bytes_after.bit_length()']
    wrong = ['castlm.train("m", "t", "o", max_step=2)', 'castlm.prune("m", "t", output_dir="o", rotate="of")']
    (tmp_path / "calls.py").write_text("\n".join(["import castlm", *calls, *wrong]))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "calls.py")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert set(re.findall(r"calls\.py:(\d+): error", done.stdout)) == {"4", "5"}, done.stdout


@pytest.mark.parametrize("given", ["demo", None, 3, torch.ones(4, 4)], ids=["name", "None", "int", "tensor"])
def test_functions_of_a_model_in_memory_name_what_they_were_given(given, tmp_path):
    ids, tokenizer = torch.zeros(1, 8, dtype=torch.long), tiny_tokenizer()
    calls = {
        "sparse_linears": lambda: castlm.sparse_linears(given),
        "sparse_param_groups": lambda: castlm.sparse_param_groups(given),
        "prune_": lambda: castlm.prune_(given),
        "prune_oneshot_": lambda: castlm.prune_oneshot_(given, "wanda", calibration=ids),
        "add_weight_scaling": lambda: castlm.add_weight_scaling(given),
        "fold_weight_scaling": lambda: castlm.fold_weight_scaling(given),
        "linearize_experts_": lambda: castlm.linearize_experts_(given),
        "keep_pattern_": lambda: castlm.keep_pattern_(given),
        "pack_model_": lambda: castlm.pack_model_(given),
        "to_semi_structured_": lambda: castlm.to_semi_structured_(given, 4),
        "calibration_length": lambda: castlm.calibration_length(given),
        "perplexity": lambda: castlm.perplexity(given, ids[0]),
        "export_model": lambda: castlm.export_model(given, tokenizer, tmp_path / "out"),
        "save_model": lambda: castlm.save_model(given, tokenizer, tmp_path / "out"),
        "nm_mask": lambda: castlm.nm_mask(given if given is None else str(given)),
    }
    for name, call in calls.items():
        with pytest.raises(
            castlm.InputError, match=r"must be .*, not the (str|NoneType|int|Tensor) .*: pass"
        ) as caught:
            call()
        assert "\n" not in str(caught.value), name
    sections = dict.fromkeys(castlm.TrainConfig.sections(), given)
    with pytest.raises(castlm.InputError, match=r"section model must be ModelOptions.*TrainConfig\.of"):
        castlm.TrainConfig(**sections)
    with pytest.raises(castlm.InputError, match="tokenizer"):
        castlm.save_model(tiny_model("llama"), given, tmp_path / "out")
    model = tiny_model("llama")
    with pytest.raises(castlm.InputError, match="text must be"):
        castlm.perplexity(model, "a text")
    with pytest.raises(castlm.InputError, match=r"shape \(1, 8\)"):
        castlm.perplexity(model, ids)
    with pytest.raises(castlm.InputError, match="masks must"):
        castlm.prune_(model, masks=[ids])
    for name in ("basis", "refinements"):
        with pytest.raises(castlm.InputError, match=f"{name} must be"):
            castlm.prune_oneshot_(model, "wanda", calibration=ids, **{name: given})
    assert not any(tmp_path.iterdir())
