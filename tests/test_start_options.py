"""A start that is continued with another option: the option is refused by name, or has no effect on the bits.

For every option of `castlm prune`, `quantize` and `train`, and in both directions. The record of an unfinished start is
taken where the start begins; the comparison of two records is the one that a start makes.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import castlm
from castlm.api.prune import PruneOptions
from castlm.cli.quantize import QuantizeCommand
from castlm.core.errors import InputError
from castlm.oneshot import run as start_module
from castlm.oneshot.folder import PROGRESS, StartFolder, partial_folder
from castlm.training.config import TrainConfig
from castlm.training.options import StartOptions
from castlm.training.train import train
from tests.runs import assert_equal_weights, edit_json, edit_weights, killed_in, prune_to, small
from tests.slow import slow
from tests.tiny import TEXT, save_tiny

Change = dict[str, Any]


class Begun(BaseException):
    """Ends a command where its start begins."""


@pytest.fixture
def record_of(monkeypatch) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """The options that a start would record, as JSON gives them back; empty where it records none."""

    def found(run: Callable[[], Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        class Folder(StartFolder):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                seen.update(json.loads(json.dumps(self.options)))
                raise Begun

        with monkeypatch.context() as patch:
            patch.setattr(start_module, "StartFolder", Folder)
            try:
                run()
            except Begun:
                assert seen
        return seen

    return found


def assert_refused_both_ways(one: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    """Checks that neither record continues the other, and that the error names an option that differs."""
    for number, (then, now) in enumerate(((one, other), (other, one))):
        place = folder / str(number)
        place.mkdir(parents=True)
        record = {"options": then, "done": 0, "results": {}, "files": {}}
        (place / PROGRESS).write_text(json.dumps(record))
        StartFolder(place, then)
        with pytest.raises(InputError, match="unfinished start with") as caught:
            StartFolder(place, now)
        named = str(caught.value).split("unfinished start with ")[1].split(" = ")[0]
        assert then.get(named) != now.get(named)


def texts_of(folder: Path) -> tuple[str, str]:
    """Two texts with the columns text and other, and with the same rows in another order."""
    rows = [json.dumps({"text": line, "other": line[::-1]}) + "\n" for line in TEXT.split("\n\n")]
    for name, lines in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        (folder / name).write_text("".join(lines))
    return str(folder / "a.jsonl"), str(folder / "b.jsonl")


STEPS: dict[str, Change] = {
    "rotate": {"rotate": "off"},
    "permute": {"permute": False},
    "both": {"rotate": "off", "permute": False},
    "rotation_iterations": {"rotation_iterations": 3},
    "permute_iterations": {"permute_iterations": 2},
    "staged_statistics": {"staged_statistics": False},
    "mask_iterations": {"mask_iterations": 0},
    "refit_iterations": {"refit_iterations": 3},
    "reconstruct_epochs": {"reconstruct_epochs": 1},
    "reconstruct_rate": {"reconstruct_epochs": 1, "reconstruct_rate": 0.5},
    "damping": {"damping": 0.2},
    "start_effort": {"start_effort": "quick"},
}
"""Another value of each option of a start, with options that it needs; the first differs from the default."""
NEEDS: dict[str, Change] = {"reconstruct_rate": {"reconstruct_epochs": 1}}
"""Options that both sides have."""
PRUNE: dict[str, Change] = {
    **STEPS,
    "method": {"method": "wanda"},
    "basis of wanda": {"method": "wanda", "rotate": "off", "permute": False},
    "pattern": {"pattern": "1:4"},
    "num_sequences": {"num_sequences": 5},
    "seq_len": {"seq_len": 16},
    "seed": {"seed": 1},
    "calibration": {"calibration": "b.jsonl"},
    "column": {"column": "other"},
    "precision": {"precision": "bf16"},
    "save_dtype": {"save_dtype": "bf16"},
    "model": {"model": "another"},
    "memory": {"memory": "block"},
}
NEEDS |= {"basis of wanda": {"method": "wanda"}}
NO_EFFECT_OF_PRUNE = {
    "output_dir": "another folder has another start",
    "device": "a GPU is recorded as the device of the work",
    "overwrite": "begins again",
    "allow_dense": "refuses a model, and changes none",
    "revision": "is part of the name of the model",
    "trust_remote_code": "refuses a model, and changes none",
    "chat_template_path": "of conversations, whose tokens are compared",
    "document_limit": "refuses a document, and changes none",
}


def test_every_option_of_a_prune_is_tried():
    assert {field.name for field in dataclasses.fields(PruneOptions)} == {*PRUNE, *NO_EFFECT_OF_PRUNE} - {
        "both",
        "basis of wanda",
    }
    assert {option.name for option in dataclasses.fields(StartOptions)} <= {*TRAIN}


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """Models and texts."""
    folder = tmp_path_factory.mktemp("ground")
    save_tiny(folder / "model", "llama")
    save_tiny(folder / "another", "llama")
    texts_of(folder)
    prune_to(folder / "sparse", folder / "model")
    return folder


def prune(ground: Path, output: Path, **over: Any) -> None:
    options = {"num_sequences": 4, "seq_len": 32, "rotation_iterations": 2} | over
    if options.get("rotate") == "off" or "start_effort" in options:
        del options["rotation_iterations"]
    model, text = (
        ground / options.pop(name, default) for name, default in (("model", "model"), ("calibration", "a.jsonl"))
    )
    castlm.prune(model, text, output_dir=output, **options)


@pytest.mark.parametrize("option", PRUNE)
def test_a_prune_is_not_continued_with_another(option, ground, record_of, tmp_path):
    both = NEEDS.get(option, {})
    one = record_of(lambda: prune(ground, tmp_path / "one", **both))
    other = record_of(lambda: prune(ground, tmp_path / "two", **(both | PRUNE[option])))
    assert one != other
    assert_refused_both_ways(one, other, tmp_path / "records")


QUANTIZE: dict[str, Change] = {
    "model": {"model": "another"},
    "kind": {"kind": "int3"},
    "packed": {"packed": True},
    "calibration": {"calibration": "b.jsonl"},
    "column": {"column": "other"},
    "num_sequences": {"num_sequences": 5},
    "seq_len": {"seq_len": 16},
    "seed": {"seed": 1},
    "damping": {"damping": 0.2},
    "save_dtype": {"save_dtype": "bf16"},
}
NO_EFFECT_OF_QUANTIZE = {
    "output_dir": NO_EFFECT_OF_PRUNE["output_dir"],
    "device": NO_EFFECT_OF_PRUNE["device"],
    "overwrite": NO_EFFECT_OF_PRUNE["overwrite"],
    "trust_remote_code": NO_EFFECT_OF_PRUNE["trust_remote_code"],
    "chat_template_path": NO_EFFECT_OF_PRUNE["chat_template_path"],
    "document_limit": NO_EFFECT_OF_PRUNE["document_limit"],
    "head": "is rounded once all blocks are done",
    "pattern": "is counted before and after; each zero stays",
}


def quantize(ground: Path, output: Path, **over: Any) -> None:
    options: dict[str, Any] = {"kind": "int4", "calibration": "a.jsonl", "num_sequences": 4, "seq_len": 32} | over
    model = str(ground / options.pop("model", "model"))
    if options["calibration"] is not None:
        options["calibration"] = str(ground / options["calibration"])
    assert QuantizeCommand(model=model, output_dir=str(output), **options).run() == 0


def test_every_option_of_a_quantize_is_tried():
    assert {field.name for field in dataclasses.fields(QuantizeCommand)} == {*QUANTIZE, *NO_EFFECT_OF_QUANTIZE}


@pytest.mark.parametrize("option", [*QUANTIZE, "no calibration"])
def test_a_quantize_is_not_continued_with_another(option, ground, record_of, tmp_path):
    change = {"calibration": None} if option == "no calibration" else QUANTIZE[option]
    one = record_of(lambda: quantize(ground, tmp_path / "one"))
    other = record_of(lambda: quantize(ground, tmp_path / "two", **change))
    assert_refused_both_ways(one, other, tmp_path / "records")


def test_a_quantize_that_continues_prints_it(ground, tmp_path, capsys):
    with killed_in(StartFolder, "record", call=2):
        quantize(ground, tmp_path / "out", packed=True)
    quantize(ground, tmp_path / "out", packed=True)
    assert "continuing after 1 of 2" in capsys.readouterr().err


TRAIN: dict[str, Change] = {
    **STEPS,
    "init_from": {"init_from": "wanda"},
    "calibration_sequences": {"calibration_sequences": 5},
    "pattern": {"pattern": "1:4"},
    "left_dense": {"left_dense": ("v_proj",)},
    "dataset": {"dataset": "b.jsonl"},
    "column": {"column": "other"},
    "seq_len": {"seq_len": 16},
    "seed": {"seed": 1},
    "model": {"model": "other weights"},
    "decay": {"decay": "proportional"},
    "precision": {"precision": "bf16"},
}
"""Options of a run on which its start depends."""


def config_of(ground: Path, output: Path, **over: Any) -> TrainConfig:
    options: dict[str, Any] = {"init_from": "sparsegpt", "rotation_iterations": 2, "ignore_decay_budget": True} | over
    if options.get("rotate") == "off" or "start_effort" in options:
        del options["rotation_iterations"]
    model, dataset = options.pop("model", "model"), options.pop("dataset", "a.jsonl")
    return small(str(ground / model), str(ground / dataset), output, **options)


@pytest.mark.parametrize("option", TRAIN)
def test_the_start_of_a_run_is_not_continued_with_another(option, ground, record_of, tmp_path):
    if option == "model":
        save_tiny(ground / "other weights", "llama", seed=1)
    both = NEEDS.get(option, {})
    one = record_of(lambda: train(config_of(ground, tmp_path / "one", **both)))
    other = record_of(lambda: train(config_of(ground, tmp_path / "two", **(both | TRAIN[option]))))
    assert_refused_both_ways(one, other, tmp_path / "records")


def fields_of(config: TrainConfig) -> set[str]:
    return {field.name for section in TrainConfig.sections().values() for field in dataclasses.fields(section)}


def test_no_other_option_of_a_run_reaches_its_start(ground, record_of, tmp_path):
    """Of those that change the result, and that the checks of the saved run therefore compare."""
    others: dict[str, Change] = {
        "max_steps": {"max_steps": 9},
        "learning_rate": {"learning_rate": 1e-2},
        "eta": {"eta": 0.5},
        "mask_interval": {"mask_interval": 2},
        "scale_groups": {"scale_groups": 0},
        "save_dtype": {"save_dtype": "bf16"},
        "hidden_weight": {"hidden_weight": 1.0},
        "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    }
    assert others.keys() <= fields_of(config_of(ground, tmp_path / "one"))
    one = record_of(lambda: train(config_of(ground, tmp_path / "one")))
    for option, change in others.items():
        config = config_of(ground, tmp_path / option, **change)
        assert record_of(lambda config=config: train(config)) == one, option


# ---- the model itself


@pytest.mark.parametrize("edit", ["rms_norm_eps", "rope_parameters", "weights"])
@pytest.mark.parametrize("name", ["prune", "quantize"])
def test_an_edited_model_does_not_continue(name, edit, ground, tmp_path):
    """Also weights whose file keeps its size and its time of change."""
    model = shutil.copytree(ground / "model", tmp_path / "model")
    (tmp_path / "a.jsonl").symlink_to(ground / "a.jsonl")
    run = {"prune": prune, "quantize": quantize}[name]
    more = {"memory": "block"} if name == "prune" else {}
    with killed_in(StartFolder, "record", call=2):
        run(tmp_path, tmp_path / "out", **more)
    file = model / "model.safetensors"
    times = os.stat(file)
    if edit == "weights":
        edit_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][7].mul_(2))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        value = 0.5 if edit == "rms_norm_eps" else {"rope_type": "default", "rope_theta": 50.0}
        edit_json(model / "config.json", **{edit: value})
    with pytest.raises(InputError, match=f"unfinished start with {'weights' if edit == 'weights' else 'config'} = "):
        run(tmp_path, tmp_path / "out", **more)


@pytest.mark.parametrize("option", ["reconstruct_epochs", slow("both"), slow("method")])
def test_a_killed_prune_with_a_step_switched_off_is_refused_and_continues_as_it_was(option, ground, tmp_path):
    prune(ground, tmp_path / "straight", **PRUNE[option])
    with killed_in(StartFolder, "record", call=2):
        prune(ground, tmp_path / "out", **PRUNE[option])
    with pytest.raises(InputError, match="unfinished start with"):
        prune(ground, tmp_path / "out")
    assert partial_folder(tmp_path / "out").exists()
    prune(ground, tmp_path / "out", **PRUNE[option])
    assert_equal_weights(tmp_path / "straight", tmp_path / "out")
