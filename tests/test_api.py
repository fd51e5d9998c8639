"""The calls of `castlm.api`: their options are those of the commands."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import castlm
from castlm.core.errors import InputError
from tests import keywords

ROOT = Path(__file__).resolve().parents[1]


def test_the_typed_keywords_are_the_fields_of_the_options():
    assert keywords.FILE.read_text() == keywords.source(), "python -m tests.keywords writes it again"


def test_signatures_at_run_time_have_the_options_with_their_defaults():
    for name, default in {"train": ("eta", 2 / 3), "prune": ("damping", 0.01), "pack": ("head", None)}.items():
        assert inspect.signature(getattr(castlm, name)).parameters[default[0]].default == default[1]
    assert "init_from" not in inspect.signature(castlm.finetune).parameters
    assert "lora_r" not in inspect.signature(castlm.train).parameters


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
