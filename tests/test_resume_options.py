"""Work that is continued with another option: the option is refused by name, or has no effect on the bits.

For every option of `castlm prune`, `quantize` and `train`, as the fields of their dataclasses list them, and in both
directions.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from safetensors.torch import load_file

import castlm
from castlm.api.prune import PruneOptions
from castlm.cli.quantize import QuantizeCommand
from castlm.core.errors import InputError
from castlm.fields import LIMITS, choices_of, default_of, hints_of, is_required, unmet
from castlm.oneshot import run as start_module
from castlm.oneshot.folder import PROGRESS, StartFolder, partial_folder
from castlm.training.config import TrainConfig
from castlm.training.train import train
from castlm.training.trainer import Trainer
from tests.runs import assert_equal_weights, edit_json, edit_weights, killed_in, small, train_until
from tests.slow import slow, slow_but
from tests.tiny import TEXT, save_tiny

Change = dict[str, Any]


# ---- another value of each option


def fields_of(*kinds: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The options of dataclasses by name, with their types."""
    return {field.name: (field, hints_of(kind)[field.name]) for kind in kinds for field in dataclasses.fields(kind)}


def other_values(field: dataclasses.Field[Any], hint: Any, now: Any) -> Iterator[Any]:
    """Values that an option may have other than `now`, by its type, its choices and its limits."""
    if isinstance(now, bool):
        yield not now
    yield from (name for name in choices_of(field) or () if name != now)
    kinds = {hint, *get_args(hint)}
    for kind in kinds:
        yield from (value for value in get_args(kind) if get_origin(kind) is Literal and value != now)
    number = now if isinstance(now, (int, float)) and not isinstance(now, bool) else 0
    for value in (number + 1, number * 2, number * 0.75, number * 0.5, 0.5, 2):
        fits = all(LIMITS[name](value, limit) for name, limit in field.metadata.items() if name in LIMITS)
        if fits and value != now and (float in kinds or (int in kinds and value == int(value))):
            yield value if float in kinds else int(value)


OTHER: dict[str, Any] = {
    "model": "other weights",
    "calibration": "b.jsonl",
    "dataset": "b.jsonl",
    "eval_dataset": "b.jsonl",
    "general_dataset": "b.jsonl",
    "column": "other",
    "pattern": "1:4",
    "left_dense": ("v_proj",),
    "init_from": "wanda",
    "teacher": "other weights",
    "teacher_cache": "cache",
    "chat_template_path": "template.jinja",
    "adam_betas": (0.8, 0.95),
    "seq_len": 16,
    "calibration_sequences": 5,
    "mask_iterations": 2,
    "num_train_epochs": 0.5,
    "report_to": ("none",),
    "timeout_s": 900.0,
    "sharding": "replicate",
    "device": "cpu",
    "solver": "wanda",
    "method": "srste",
    "lam": 1e-6,
    "kind": "int3",
    "scale_groups": 4,
}
"""Another value of options that are names of things, or whose first other value does not suit a tiny run."""

OF_THE_HUB = (
    "revision",
    "dataset_split",
    "eval_split",
    "hub_model_id",
)
PLACES = ("output_dir", "gguf", "resume", "overwrite")
UNTRIED = {
    **dict.fromkeys((*OF_THE_HUB, "push_to_hub"), "asks the hub"),
    **dict.fromkeys(PLACES, "names the place of the work, and whether it continues"),
    "adapter": "of castlm finetune",
    "lora_r": "of castlm finetune",
    "moments_on_host": "of a GPU",
    "torch_compile": "of a GPU",
}
FILES = ("model", "calibration", "dataset", "eval_dataset", "general_dataset", "teacher", "teacher_cache")
FILES += ("chat_template_path",)


def texts_of(folder: Path) -> None:
    """Two texts with the columns text and other, and with the same rows in another order; and a template."""
    rows = [json.dumps({"text": line, "other": line[::-1]}) + "\n" for line in TEXT.split("\n\n")]
    for name, lines in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        (folder / name).write_text("".join(lines))
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """Models and texts."""
    folder = tmp_path_factory.mktemp("ground")
    save_tiny(folder / "model", "llama")
    save_tiny(folder / "other weights", "llama", seed=1)
    texts_of(folder)
    return folder


def placed(ground: Path, options: Change) -> Change:
    """Options with the paths of the files that they name."""
    return {name: str(ground / value) if name in FILES and value else value for name, value in options.items()}


# ---- the record of a start


class Begun(BaseException):
    """Ends a command where its start is done."""


def start_of(run: Callable[[], Any], only_record: bool = False) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The options that a start records, as JSON gives them back, and the files of its blocks; empty without a start."""
    record: dict[str, Any] = {}
    blocks: dict[str, bytes] = {}

    class Folder(StartFolder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            record.update(json.loads(json.dumps(self.options)))
            if only_record:
                raise Begun

        def record(self, done: int, results: Any, streams: Any, has_next: bool) -> None:
            super().record(done, results, streams, has_next)
            if not has_next:
                blocks.update({file.name: file.read_bytes() for file in self.path.glob("block-*")})
                raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_module, "StartFolder", Folder)
        try:
            run()
        except Begun:
            assert record
    return record, blocks


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


def assert_no_mixture(run: Callable[[Path, Change], Any], context: Change, change: Change, folder: Path) -> None:
    """Checks that a start with `change` does not continue one without it, or has the same blocks."""
    one, _ = start_of(lambda: run(folder / "one", context), only_record=True)
    other, _ = start_of(lambda: run(folder / "two", context | change), only_record=True)
    if one == other:
        whole = [
            start_of(lambda options=options, name=name: run(folder / name, options))[1]
            for name, options in (("three", context), ("four", context | change))
        ]
        assert whole[0] == whole[1], "the blocks of a start depend on an option that its record lacks"
    else:
        assert_refused_both_ways(one, other, folder / "records")


def prune(ground: Path, output: Path, options: Change) -> None:
    options = {"model": "model", "calibration_sequences": 4, "seq_len": 32, **options}
    if options.get("solver") != "magnitude":
        options.setdefault("calibration", "a.jsonl")
    given = placed(ground, options)
    castlm.prune(given.pop("model"), given.pop("calibration", None), output_dir=output, **given)


def quantize(ground: Path, output: Path, options: Change) -> None:
    options = {
        "model": "model",
        "kind": "int4",
        "calibration": "a.jsonl",
        "calibration_sequences": 4,
        "seq_len": 32,
    } | options
    assert QuantizeCommand(output_dir=str(output), **placed(ground, options)).run() == 0


def with_context(
    fields: dict[str, tuple[dataclasses.Field[Any], Any]],
    name: str,
    contexts: list[Change],
    values: Change,
    made: Callable[[Change], Any],
) -> tuple[Change, Change]:
    """The first context in which an option has an effect, and another value of the option.

    Args:
        values: the options without a context, where they are not the defaults.
        made: the options of a context as attributes of one object; raises `InputError` for a bad combination.
    """
    field, hint = fields[name]
    for context in contexts:
        now = (values | context).get(name, None if is_required(field) else default_of(field))
        found = OTHER.get(name)
        for value in other_values(field, hint, now) if found is None else [found]:
            try:
                options = made(values | context | {name: value})
            except InputError:
                continue
            if value != now and unmet(field, options) is None:
                return context, {name: value}
    raise AssertionError(f"no other value of {name} has an effect")


PRUNE_CONTEXTS: list[Change] = [{}, {"reconstruct_epochs": 1}, {"rotate": "off"}]
PRUNE_FIELDS = fields_of(PruneOptions)
PRUNE_VALUES: Change = {"model": "model", "output_dir": "out", "calibration": "a.jsonl", "calibration_sequences": 4}


@pytest.mark.parametrize(
    "name", slow_but(("solver", "permute", "save_dtype"), sorted(PRUNE_FIELDS.keys() - UNTRIED.keys()))
)
def test_a_prune_is_not_continued_with_another(name, ground, tmp_path):
    def made(options: Change) -> PruneOptions:
        return PruneOptions(**options)

    context, change = with_context(PRUNE_FIELDS, name, PRUNE_CONTEXTS, PRUNE_VALUES, made)
    assert_no_mixture(functools.partial(prune, ground), context, change, tmp_path)


@pytest.mark.parametrize("options", [{"rotate": "off", "permute": False}, {"calibration": None}], ids=str)
def test_a_start_without_a_step_that_it_had_is_another(options, ground, tmp_path):
    run = functools.partial(quantize if "calibration" in options else prune, ground)
    context: Change = {} if "calibration" in options else {"solver": "wanda"}
    assert_no_mixture(run, context, options, tmp_path)


QUANTIZE_FIELDS = fields_of(QuantizeCommand)
QUANTIZE_VALUES: Change = {"model": "model", "output_dir": "out", "kind": "int4", "calibration": "a.jsonl"}


@pytest.mark.parametrize("name", slow_but(("kind", "seed"), sorted(QUANTIZE_FIELDS.keys() - UNTRIED.keys())))
def test_a_quantize_is_not_continued_with_another(name, ground, tmp_path):
    def made(options: Change) -> QuantizeCommand:
        return QuantizeCommand(**options)

    contexts: list[Change] = [{"packed": True}] if name == "head" else [{}, {"train_steps": 2}]
    context, change = with_context(QUANTIZE_FIELDS, name, contexts, QUANTIZE_VALUES, made)
    if name == "pattern":
        change = {"pattern": "dense"}
    assert_no_mixture(functools.partial(quantize, ground), context, change, tmp_path)


def test_a_quantize_that_continues_prints_it(ground, tmp_path, capsys):
    with killed_in(StartFolder, "record", call=2):
        quantize(ground, tmp_path / "out", {"packed": True})
    quantize(ground, tmp_path / "out", {"packed": True})
    assert "continuing after 1 of 2" in capsys.readouterr().err


# ---- a run


TRAIN_FIELDS = fields_of(*TrainConfig.sections().values())
TRAIN_VALUES: Change = {"init_from": "magnitude", "max_steps": 4, "save_steps": 2, "decay_end": 0.75}
TRAIN_CONTEXTS: list[Change] = [
    {},
    {"decay": "proportional"},
    {"init_from": "sparsegpt"},
    {"method": "srste", "decay_end": None},
    {"teacher_top_k": 8, "hidden_weight": 0.0},
    {"init_from": "sparsegpt", "reconstruct_epochs": 1},
    {"eval_dataset": "b.jsonl"},
]
FACTS = {
    "model": "model_fingerprint",
    "dataset": "dataset_sha256",
    "eval_dataset": "eval_sha256",
    "teacher": "teacher_fingerprint",
    "teacher_cache": "repeats_sequences",
    "per_device_train_batch_size": "world_batch",
    "gradient_accumulation_steps": "world_batch",
    "precision": "precision_used",
    "num_train_epochs": "max_steps",
}
"""The fact of a run by which a refusal names an option."""


def config_of(ground: Path, output: Path, options: Change) -> TrainConfig:
    given = placed(ground, {"model": "model", "dataset": "a.jsonl", "ignore_decay_budget": True, **options})
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("init_from") == "magnitude":
        given = {"calibration_sequences": None} | given
    if "num_train_epochs" in given:
        given["max_steps"] = 300
    return small(given.pop("model"), given.pop("dataset"), output, **given)


def changed_run(ground: Path, name: str) -> tuple[Change, Change]:
    """A context in which an option of a run has an effect, and another value of the option."""

    def made(options: Change) -> Any:
        return config_of(ground, Path("out"), options)._joined()

    return with_context(TRAIN_FIELDS, name, TRAIN_CONTEXTS, TRAIN_VALUES, made)


@pytest.mark.parametrize("name", slow_but(("damping", "seed"), sorted(TRAIN_FIELDS.keys() - UNTRIED.keys())))
def test_the_start_of_a_run_is_not_continued_with_another(name, ground, tmp_path):
    context, change = changed_run(ground, name)
    if name == "init_from":
        context = {"init_from": "sparsegpt"}
    elif "init_from" in context or name in ("method", "decay", "decay_end") or context.get("method"):
        context = {**TRAIN_VALUES, **context}
    else:
        context = {"init_from": "sparsegpt", **context}

    def run(output: Path, options: Change) -> None:
        if name == "num_train_epochs":
            options = {**options, "max_steps": 300}
        train(config_of(ground, output, options))

    with pytest.MonkeyPatch.context() as patch:  # a start that is whole already ends here
        patch.setattr(Trainer, "train", lambda *_: pytest.fail("the start is not in its folder"))
        if config_of(ground, tmp_path, context).start.name == "magnitude":
            return
        assert_no_mixture(run, context, change, tmp_path)


def stopped(ground: Path, folder: Path, options: Change) -> Path:
    """A run that was killed after step 2, which has saved it."""
    train_until(config_of(ground, folder, options), 2)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_continues_or_names(ground: Path, killed: Path, options: Change, name: str, folder: Path) -> None:
    """Resumes a killed run with other options: it is refused by the name of the one, or ends as a whole run would."""
    resumed = shutil.copytree(killed, folder / "resumed")
    try:
        train(config_of(ground, resumed, options | {"resume": True}))
    except InputError as error:
        words = str(error).replace("(", " ").split()
        if name not in words and FACTS.get(name) not in words:
            raise
        return
    train(config_of(ground, folder / "straight", options))
    found, expected = weights_of(resumed), weights_of(folder / "straight")
    if TRAIN_FIELDS[name][0].metadata.get("may_change"):  # which says that it rounds otherwise
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    else:
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@functools.cache
def stopped_once(ground: Path, context: tuple[tuple[str, Any], ...]) -> Path:
    """A stopped run for all tests of one context."""
    name = "-".join(f"{key}={value}" for key, value in context) or "plain"
    return stopped(ground, ground / "stopped" / name, {**TRAIN_VALUES, **dict(context)})


@pytest.mark.parametrize(
    "name", slow_but(("learning_rate", "save_steps"), sorted(TRAIN_FIELDS.keys() - UNTRIED.keys()))
)
@pytest.mark.parametrize("is_before", [False, slow(True)], ids=["changed on resume", "changed before"])
def test_a_run_is_not_resumed_with_another(name, is_before, ground, tmp_path, no_charts):
    context, change = changed_run(ground, name)
    options = {**TRAIN_VALUES, **context}
    if is_before:
        killed = stopped(ground, tmp_path / "killed", options | change)
        assert_continues_or_names(ground, killed, options, name, tmp_path)
    else:
        killed = stopped_once(ground, tuple(context.items()))
        assert_continues_or_names(ground, killed, options | change, name, tmp_path)


# ---- the model itself


def edit_tokenizer(model: Path) -> None:
    """Swaps two tokens."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))


def edit(model: Path, what: str) -> None:
    """Edits a model; weights so that their file keeps its size and its time of change."""
    if what == "weights":
        file = model / "model.safetensors"
        times = os.stat(file)
        edit_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][7].mul_(2))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "tokenizer":
        edit_tokenizer(model)
    else:
        value = 0.5 if what == "rms_norm_eps" else {"rope_type": "default", "rope_theta": 50.0}
        edit_json(model / "config.json", **{what: value})


EDITED = {"rms_norm_eps": "config", "rope_parameters": "config", "weights": "weights", "tokenizer": "tokenizer"}
"""The entry of a record that differs."""


@pytest.mark.parametrize("what", EDITED)
@pytest.mark.parametrize("name", ["prune", "quantize", "train"])
def test_an_edited_model_does_not_continue(name, what, ground, tmp_path):
    model = shutil.copytree(ground / "model", tmp_path / "model")
    (tmp_path / "a.jsonl").symlink_to(ground / "a.jsonl")
    if name == "train":
        stopped(tmp_path, tmp_path / "out", TRAIN_VALUES)
        edit(model, what)
        with pytest.raises(InputError, match="model_fingerprint"):
            train(config_of(tmp_path, tmp_path / "out", TRAIN_VALUES | {"resume": True}))
        return
    run = {"prune": prune, "quantize": quantize}[name]
    more = {"memory": "block"} if name == "prune" else {"calibration": None}
    with killed_in(StartFolder, "record", call=2):
        run(tmp_path, tmp_path / "out", more)
    edit(model, what)
    with pytest.raises(InputError, match=f"unfinished start with {EDITED[what]} = "):
        run(tmp_path, tmp_path / "out", more)


@pytest.mark.parametrize("options", [{"reconstruct_epochs": 1}, slow({"solver": "wanda"})], ids=str)
def test_a_killed_prune_with_a_step_switched_off_is_refused_and_continues_as_it_was(options, ground, tmp_path):
    prune(ground, tmp_path / "straight", options)
    with killed_in(StartFolder, "record", call=2):
        prune(ground, tmp_path / "out", options)
    with pytest.raises(InputError, match="unfinished start with"):
        prune(ground, tmp_path / "out", {})
    assert partial_folder(tmp_path / "out").exists()
    prune(ground, tmp_path / "out", options)
    assert_equal_weights(tmp_path / "straight", tmp_path / "out")
