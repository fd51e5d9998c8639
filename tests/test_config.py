"""TrainConfig and the command line: what is accepted, what is refused in one line, and what the help shows."""

import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

import castlm.cli.command_line
import castlm.methods
from castlm.cli.command_line import command_line, parse
from castlm.cli.main import COMMANDS
from castlm.cli.train import parse_train
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.fields import option, positional
from castlm.files.yaml_file import read_yaml_mapping
from castlm.methods.base import Retraining, class_of
from castlm.methods.table import METHODS
from castlm.training.config import RECIPES, FinetuneConfig, TrainConfig, names_of
from tests.refusals import assert_refused, refusal

REQUIRED = {"model": "m", "dataset": "d", "output_dir": "o"}


def from_yaml(tmp_path: Path, text: str, **fields: str) -> TrainConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return TrainConfig.from_mapping({**fields, **read_yaml_mapping(file)}, str(file))


# ------------------------------------------------------------------------------------------------------- the object


def test_replace_resolves_derived_defaults_again():
    config = TrainConfig.of(**REQUIRED)
    assert config.start.init_from == "sparsegpt"
    assert config.changed(method="dense").start.init_from == "magnitude"
    assert config.changed(method="srste").start.init_from == "magnitude"
    assert config.changed(method="dense").changed(method="cast") == config
    with pytest.raises(InputError, match="starts dense"):
        config.changed(method="dense", init_from="wanda")


OPTIONS = [name for section in TrainConfig.sections().values() for name in names_of(section)]


def test_the_conditions_of_every_option_can_be_asked():
    for config in (TrainConfig.of(**REQUIRED), FinetuneConfig.of("m", "d", "o")):
        assert {name: config.needs(name) for name in OPTIONS}["hub_model_id"] == "push_to_hub"
    assert {option for row in METHODS.values() for option in row.options} <= set(OPTIONS)


def test_every_method_of_the_package_has_a_row():
    for module in pkgutil.iter_modules(castlm.methods.__path__, "castlm.methods."):
        importlib.import_module(module.name)

    def below(kind: type) -> set[type]:
        return {kind, *(found for sub in kind.__subclasses__() for found in below(sub))}

    own = {kind for kind in below(Retraining) if kind.__module__.startswith("castlm.methods.")}
    assert own - {Retraining, class_of("finetune", "shira")} == {class_of(name, "none") for name in METHODS}


def test_every_option_is_in_one_section_and_has_help():
    assert len(set(OPTIONS)) == len(OPTIONS)
    for section in TrainConfig.sections().values():
        assert all(option.metadata.get("help") for option in dataclasses.fields(section))


def test_yaml_takes_options_flat_or_in_sections():
    flat = {**REQUIRED, "learning_rate": 1e-3, "method": "ste", "eta": 0.5}
    sections = {
        "model": {"model": "m"},
        "data": {"dataset": "d"},
        "checkpoint": {"output_dir": "o"},
        "optimizer": {"learning_rate": 1e-3},
        "method": {"method": "ste"},
        "eta": 0.5,
    }
    assert TrainConfig.from_mapping(flat) == TrainConfig.from_mapping(sections)


def test_a_file_may_name_an_option_in_another_section():
    elsewhere = {"start": {"init_from": "wanda"}, "method": {"adapter": "none", "lora_r": 16}}
    assert TrainConfig.from_mapping(REQUIRED | elsewhere).start.init_from == "wanda"
    with pytest.raises(InputError, match="adapter = 'lora'"):
        TrainConfig.from_mapping(REQUIRED | {"method": {"adapter": "lora"}})


def test_a_config_survives_its_own_yaml(tmp_path):
    config = TrainConfig.of("m", "d", "o", pattern="4:8", left_dense=("--odd", "x"), adam_betas=(0.9, 0.95), lam="auto")
    again = from_yaml(tmp_path, config.as_yaml())
    assert again == config
    assert again.given["init_from"] == "sparsegpt"  # the file holds what the run used


@pytest.mark.parametrize(
    ("max_steps", "num_evaluations"), [(1, 1), (5, 1), (10, 2), (11, 3), (50, 10), (51, 9), (1000, 10)]
)
def test_a_run_is_evaluated_at_most_ten_times_and_every_five_steps(max_steps, num_evaluations):
    every = TrainConfig.of(**REQUIRED).evaluation.steps_between(max_steps)
    assert len({max_steps, *range(every, max_steps + 1, every)}) == num_evaluations


NOT_DEFAULT = [{"method": method} for method in METHODS] + [{"decay": decay} for decay in DECAYS]


@pytest.mark.parametrize("fields", NOT_DEFAULT)
def test_no_option_of_a_runs_own_yaml_is_without_effect(fields, tmp_path):
    config = TrainConfig.of(**REQUIRED | fields)
    again = from_yaml(tmp_path, config.as_yaml())
    assert again.without_effect() == config.without_effect()
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize("ranks", [1, 8, 256])
@pytest.mark.parametrize("at_once", [None, 4])
def test_the_papers_batch_has_256_sequences_on_any_number_of_ranks(ranks, at_once, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    given = {**REQUIRED, "recipe": "paper"} | ({} if at_once is None else {"per_device_train_batch_size": at_once})
    if ranks * (at_once or 1) > 256:
        with pytest.raises(InputError, match="256 ranks of 4"):
            TrainConfig.from_mapping(given)
        return
    assert TrainConfig.from_mapping(given).optimizer.sequences_per_step(ranks) == 256
    changed = TrainConfig.from_mapping(given).changed(seed=1)
    assert changed.optimizer.sequences_per_step(ranks) == 256
    assert TrainConfig.from_layers([("", given)], ranks=2).optimizer.sequences_per_step(2) == 256


def test_a_recipe_is_overridden_by_what_is_given():
    config = TrainConfig.from_mapping({**REQUIRED, "recipe": "paper", "seq_len": 77})
    assert config.data.seq_len == 77
    assert config.method.decay == RECIPES["paper"]["decay"]
    config = TrainConfig.from_mapping({**REQUIRED, "recipe": "paper", "gradient_accumulation_steps": 2})
    assert config.optimizer.sequences_per_step(1) == 2
    with pytest.raises(InputError, match=r"recipe = 'papr'.*did you mean paper"):
        TrainConfig.from_mapping({**REQUIRED, "recipe": "papr"})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"lr": 1}, "x.yaml: there is no option lr; did you mean learning_rate?"),
        ({"optimizer": {"etta": 1}}, "no option etta; did you mean eta?"),
        ({"optimizer": {"max_steps": 1}, "max_steps": 2}, "max_steps is given twice"),
        ({"max_steps": None}, "x.yaml: max_steps = null is not a whole number"),
        ({"max_steps": 1.5}, "max_steps = 1.5 is not a whole number"),
        ({"max_steps": 10**30}, "max_steps = 10+ is not a whole number: it has more than 64 bits"),
        ({"max_steps": 10**12}, "max_steps = 1000000000000 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate = nan is not a number"),
        ({"lam": "automatic"}, "lam = 'automatic' is not a number or auto"),
        ({"adam_betas": [0.9]}, "adam_betas = .* is not a list: it takes 2 values"),
        ({"method": "casts"}, "method = 'casts' is not one of .*; did you mean cast?"),
        ({"pattern": "4:2"}, "4:2"),
        ({"dataset": ""}, "dataset = '' is not text or a list: it is empty"),
        ({"output_dir": "a\0b"}, "NUL character"),
        ({"output_dir": "a\udc80"}, "not UTF-8"),
        ({"model": "~nosuchuser/model"}, "there is no such user"),
        ({"model": [1]}, r"model = \[1\] is not text"),
        ({"left_dense": [""]}, "left_dense"),
        ({"async_save": "maybe"}, "async_save = 'maybe' is not true or false"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"timeout_s": 1e300}, "timeout_s = 1e\\+300 is out of range"),
        ({"eval_tokens": 1}, "eval_tokens = 1"),
        ({"eval_dataset": []}, "eval_dataset"),
    ],
)
def test_values_that_are_refused(mapping, message):
    with refusal(message):
        TrainConfig.from_mapping({**REQUIRED, **mapping}, "x.yaml")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, []),
        ({"mask_interval": 5}, []),
        ({"mask_interval": 5, "decay": "additive"}, ["mask_interval"]),
        ({"mask_interval": 5, "init_from": "magnitude"}, []),
        ({"mask_interval": 5, "method": "ast"}, []),
        ({"lam": 1e-3, "decay_end": 0.5}, ["lam"]),
        ({"lam": 1e-3, "decay_end": 0.5, "decay": "additive"}, ["decay_end"]),
        ({"lam": 1e-3}, ["lam"]),
        ({"lam": 1e-3, "decay": "none", "method": "srste"}, ["decay"]),
        ({"temperature": 2.0, "teacher_top_k": 8, "eta": 0.0}, ["temperature", "teacher_top_k"]),
        ({"eval_fraction": 0.5, "eval_dataset": "e"}, ["eval_fraction"]),
        ({"eval_fraction": 0.5, "dataset": "owner/name"}, ["eval_fraction"]),
        ({"dataset_split": "validation", "dataset": "owner/name"}, []),
        ({"eval_split": "test"}, ["eval_split"]),
        ({"eval_split": "test", "eval_dataset": "owner/name"}, []),
        ({"calibration_sequences": 9, "init_from": "some/model"}, ["calibration_sequences"]),
        (
            {"permute": False, "refit_iterations": 5, "init_from": "some/model"},
            ["refit_iterations"],
        ),
        ({"permute": False, "refit_iterations": 5}, []),
        ({"permute": False, "mask_iterations": 0, "init_from": "some/model"}, []),  # off asks for nothing
        ({"rotate": "values", "init_from": "magnitude"}, ["rotate"]),
        ({"scale_groups": 0, "pattern": "4:8", "method": "dense"}, ["scale_groups", "pattern"]),
    ],
)
def test_options_without_effect_are_named(fields, names):
    assert sorted(TrainConfig.of(**REQUIRED | fields).without_effect()) == sorted(names)


def test_options_of_hub_and_conversations_have_no_effect_on_local_plain_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.")
    local = {"dataset": str(text), "eval_dataset": str(text), "dataset_split": "test", "eval_split": "test"}
    assert sorted(TrainConfig.of(**REQUIRED | local).without_effect()) == ["dataset_split", "eval_split"]
    assert TrainConfig.of(**REQUIRED | {"dataset": str(text), "eval_fraction": 0.5}).without_effect() == {}
    config = TrainConfig.of(**REQUIRED, assistant_only_loss=False, chat_template_path="mine.jinja")
    assert config.without_effect() == {}
    assert sorted(config.without_effect(is_plain=True)) == ["assistant_only_loss", "chat_template_path"]


# ----------------------------------------------------------------------------------------------------------- YAML


def test_yaml_numbers_mean_what_they_look_like(tmp_path):
    text = "pattern: 2:4\nlearning_rate: 1e-4\nmax_steps: 1_000\nseed: 007\ncolumn: no\nasync_save: off\n"
    text += "revision: 2024\n"
    config = from_yaml(tmp_path, text, **REQUIRED)
    found = config.as_dict()
    expected = {"pattern": "2:4", "learning_rate": 1e-4, "max_steps": 1000, "seed": 7, "column": "no"}
    assert found.items() >= (expected | {"async_save": False, "revision": "2024"}).items()
    file = tmp_path / "plain.yaml"
    file.write_text("a: 2001-12-14\nb: 0o17\nc: 0x1F\nd: 1:20:30\ne: ~\nf: [1, 2.5, 'x']\ng: .inf\n")
    with pytest.raises(InputError, match=r"learning_rate = '1\.5e-999' .*too small"):
        from_yaml(tmp_path, "learning_rate: 1.5e-999\n", **REQUIRED)
    assert from_yaml(tmp_path, "eta: 0e-999\n", **REQUIRED).teacher.eta == 0
    expected = {"a": "2001-12-14", "b": "0o17", "c": "0x1F", "d": "1:20:30", "e": None, "f": [1, 2.5, "x"], "g": ".inf"}
    assert read_yaml_mapping(file) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_steps: 1\nmax_steps: 2\n", "line 2: .*once"),
        (b"a: &x [1]\nb: *x\n", "line 1: an alias"),
        (b"a: !!python/object/apply:os.system [true]\n", "tag .* is not supported"),
        (b"? [a]\n: b\n", "a key"),
        (b"- 1\n", "not a mapping"),
        (b"a: [1\n", "is not valid YAML"),
        (b"a: \xff\n", "not UTF-8"),
        (b"a: \x00\n", "is not valid YAML"),
        (b"#" * (1 << 20) + b"#", "larger than 128 KiB"),
    ],
)
def test_yaml_that_is_refused(content, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with refusal(message) as error:
        read_yaml_mapping(file)
    assert str(error.value).count(str(file)) == 1


# --------------------------------------------------------------------------------------------------- command line


def test_later_files_and_then_options_override(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("recipe: paper\nmodel: m\ndataset: d\nseq_len: 10\neta: 0.1\nseed: 1\n")
    second.write_text("eta: 0.2\nseed: 2\n")
    config, _ = parse_train(["--config", str(first), "--output-dir=o", f"--config={second}", "--seed", "3"])
    assert config.as_dict().items() >= {"decay": "proportional", "seq_len": 10, "eta": 0.2, "seed": 3}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1"], "there is no option --lr; did you mean --learning-rate?"),
        (["--max-step=3"], "there is no option --max-step; did you mean --max-steps?"),
        (["--num-train-epochs", "nan"], "--num-train-epochs = 'nan' is not a number: it must be finite"),
        (
            ["--learning-rate", "\uff10.\uff11"],
            "--learning-rate = '\\uff10.\\uff11' is not a number: write its digits in ASCII",
        ),
        (["--learning-rate", "1e-1000"], "--learning-rate = '1e-1000' is not a number: it is too small for a float"),
        (["--max-steps", "\uff110"], "--max-steps = '\\uff110' is not a whole number"),
        (["--max-steps"], "expected one argument"),
        (["--model", "m"], "dataset is missing: give --dataset"),
        (["m", "extra"], "unrecognized arguments: extra"),
        (["--adapter", "shira"], "castlm train does not read --adapter: leave it out, or use castlm finetune"),
        (["--lora_r=4"], "castlm train does not read --lora-r"),
        (["--adam-betas", "0.9"], "expected 2 arguments"),
        (["--moments", "4bit"], "--moments = '4bit' is not one of fp32, 8bit; did you mean 8bit?"),
    ],
)
def test_options_that_are_refused(arguments, message, capsys):
    assert_refused([(["train", *arguments], message)], capsys)


def test_hugging_face_spelling_both_sides_of_a_switch_and_repeated_lists():
    base = ["--model=m", "--dataset", "d", "e", "--output_dir=o", "--learning_rate", "1e-5", "--dataset=f"]
    config, _ = parse_train([*base, "--no-async-save", "--resume", "--no-resume", "--left-dense", "a", "b"])
    assert config.as_dict().items() >= {"learning_rate": 1e-5, "async_save": False, "resume": False}.items()
    assert (config.data.dataset, config.model.left_dense) == (("d", "e", "f"), ("a", "b"))


def test_help_of_train_fits_on_two_screens_and_needs_no_torch():
    code = (
        "import sys; from castlm.cli.main import main\n"
        "try: main(['train', sys.argv[1]])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'rich', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    short, long = (
        subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True).stdout
        for option in ("--help", "--help-all")
    )
    lines = short.splitlines()
    assert len(lines) <= 100
    assert max(map(len, [*lines, *long.splitlines()])) <= 100
    essential = short.partition("most important options:")[2].partition("\n\n")[0]
    assert sum(line.startswith("  --") for line in essential.splitlines()) == 11
    assert "  --config " in essential
    for title in set(TrainConfig.sections()) - {"adapter"}:
        assert f"\n{title}:" in short
    assert not [name for name in ("--adapter", "--lora-r") if name in long]  # of castlm finetune
    for name in (name.replace("_", "-") for name in OPTIONS if name not in ("adapter", "lora_r")):
        assert f"--{name}" in short or f"--no-{name}" in short
        assert f"  --{name}" in long or f"  --no-{name}" in long
    for clumsy in ("{None}", "None", "0.6666", "--no-no", "MISSING"):
        assert clumsy not in long


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_help(command, monkeypatch):
    seen: list[tuple[str, str]] = []

    def described(kind, field):
        seen.append((field.name, field.metadata.get("help", "")))
        return []

    monkeypatch.setattr(castlm.cli.command_line, "_described", described)
    with pytest.raises(SystemExit):
        COMMANDS[command].run(command, ["--help-all"])
    assert seen
    assert not [name for name, text in seen if not text]


def test_no_help_of_a_command_imports_torch():
    """In one fresh process: what one help imports, the next has too."""
    code = (
        "import sys; from castlm.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    for option in ('--help', '--help-all'):\n"
        "        try: main([*name.split(), option])\n"
        "        except SystemExit as stop: assert not stop.code\n"
        "        found = {'torch', 'transformers', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "        assert not found, (name, option, found)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_list_of_commands_imports_nothing_heavy():
    code = (
        "import sys; from castlm.cli.main import main; main(['--help'])\n"
        "assert not {'torch', 'yaml', 'argparse', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("castlm p", {"prune", "pack", "plan"}, {"train", "plan memory"}),
        ("castlm plan ", {"check", "memory", "fit", "predict"}, {"train"}),
        ("castlm plan memory --p", {"--pattern", "--prune"}, {"--push-to-hub"}),
        ("castlm train --learning", {"--learning-rate"}, {"--learning_rate"}),
        ("castlm train --method s", {"ste", "srste"}, {"cast"}),
        ("castlm prune --memory ", {"auto", "model", "block"}, {"--model"}),
        ("python -m castlm quantize model --kind int", {"int8", "int4", "int3"}, {"fp8"}),
    ],
)
def test_a_shell_completes_commands_options_and_names(line, some, none, tmp_path):
    asked = {"_ARGCOMPLETE": "3" if line.startswith("python") else "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    asked |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    code = "from castlm.cli.main import main; main([])"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    found = {word.strip() for word in (tmp_path / "answer").read_text().splitlines()}
    assert some <= found
    assert not none & found


@dataclass
class Options:
    """Try things."""

    path: str = positional(help="Where.")
    size: int = option(3, at_least=1, help="How large.")

    ratio: float | None = None
    mode: Literal["a", "b"] = "a"
    fast: bool = True
    names: tuple[str, ...] = ()


def test_a_dataclass_becomes_a_command_line_and_back(capsys):
    options = parse(Options, ["p", "--size", "4", "--no-fast", "--names", "x", "y"], "try")
    assert options == Options("p", size=4, fast=False, names=("x", "y"))
    assert command_line("try", Options("-p", size=4, fast=False)) == "castlm try --path=-p --size 4 --no-fast"
    with pytest.raises(InputError, match="--size = 0"):
        parse(Options, ["p", "--size", "0"], "try")
    with pytest.raises(InputError, match="required: path"):
        parse(Options, [], "try")
    with pytest.raises(SystemExit):
        parse(Options, ["--help"], "try")
    out = capsys.readouterr().out
    assert "usage: castlm try PATH [OPTIONS]" in out
    assert "--size INT                  How large. (default: 3)" in out
    assert "--no-fast" in out


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_configs_are_read_and_those_of_many_gpus_make_the_published_batch(file):
    config = TrainConfig.from_mapping({**REQUIRED, **read_yaml_mapping(file)}, str(file))
    assert config.model.pattern == NM(2, 4)
    assert yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.stem.endswith("x80gb"):
        ranks, sizes = int(file.stem.rsplit("-", 1)[1].split("x")[0]), config.optimizer
        assert ranks * sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps == 256
        assert config.data.seq_len == 4096
