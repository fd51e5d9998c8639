"""Small runs of `castlm train` in tests: one that is stopped as by a kill, resumed, and compared bit for bit."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from castlm.cli.main import main
from castlm.training.checkpoint import checkpoint_steps
from castlm.training.config import TrainConfig
from castlm.training.objective import Objective
from castlm.training.train import train
from castlm.training.trainer import Trainer
from castlm.world import World, init_world

SMALL: dict[str, Any] = {
    "max_steps": 8,
    "calibration_sequences": 4,
    "decay_end": 0.75,  # still decaying where a run is stopped
    "seq_len": 32,
    "per_device_train_batch_size": 4,
    "eval_tokens": 256,
    "mask_interval": 3,
    "save_steps": 0,
    "eval_steps": 4,
    "learning_rate": 1e-3,
}


def small(model: str, dataset: str, output_dir: Path, **over: Any) -> TrainConfig:
    """A run that is small by its sizes alone: what it does, and how, is what users get."""
    return TrainConfig.of(model, dataset, str(output_dir), **{**SMALL, **over})


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the arguments of a command."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def small_command(command: str, model: str | Path, dataset: str | Path, output_dir: Path, **over: Any) -> list[str]:
    """The arguments of a small run on the command line."""
    return [command, *flags({"model": model, "dataset": dataset, "output_dir": output_dir, **SMALL, **over})]


def prune_to(folder: Path, model: str | Path, text: str | Path | None = None, **over: Any) -> str:
    """Runs `castlm prune`, by magnitude where there is no text, and returns the folder."""
    sizes = {"calibration": text, "calibration_sequences": 4, "seq_len": 32}
    options = {"model": model, "output_dir": folder, **(sizes if text else {"solver": "magnitude"}), **over}
    assert main(["prune", *flags(options)]) == 0
    return str(folder)


def begin_run(config: TrainConfig, world: World | None = None) -> Trainer:
    """A run before its first step, on one rank by default, for tests that take the steps themselves."""
    return Trainer(config, world or init_world("cpu", "full"))


def take_steps(run: Trainer, number: int = 1) -> None:
    """Takes steps of a run that leave nothing in its folder."""
    for _ in range(number):
        run.train_step()


@contextlib.contextmanager
def teacher_batches() -> Iterator[list[tuple[int, ...]]]:
    """Gives the shapes of the batches that a teacher reads within the block."""
    read: list[tuple[int, ...]] = []
    output_of = Objective._read_teacher

    def output_noted(self: Objective, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        read.append(tuple(inputs["input_ids"].shape))
        return output_of(self, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "_read_teacher", output_noted)
        yield read


class Stopped(Exception):  # noqa: N818
    """Stands for a kill."""


def before_each_step(patch: pytest.MonkeyPatch, action: Callable[[Trainer], Any]) -> None:
    """Lets every `train` call `action` before each of its steps, of a lam estimate too."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        action(self)
        return original(self)

    patch.setattr(Trainer, "train_step", train_step)


def before_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[Trainer], Any]) -> None:
    """Lets every `train` call `action` after `step` steps, before the next one."""
    before_each_step(patch, lambda run: action(run) if run.step == step else None)


def train_until(config: TrainConfig, step: int) -> None:
    """Trains, and ends as a kill would, right after step `step`, whose checkpoint is whole if it has one."""

    def stop(run: Trainer) -> None:
        run.saver.finish()
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, step, stop)
        with pytest.raises(Stopped):
            train(config)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing may catch it and continue."""


@contextlib.contextmanager
def killed_in(owner: Any, name: str, call: int = 1) -> Iterator[None]:
    """Ends the block by a kill at the `call`-th call of `owner.name`."""
    function, calls = getattr(owner, name), count(1)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            yield


def stop_and_resume(straight: TrainConfig, step: int) -> Path:
    """Trains as `straight`, which is done, but stopped after `step` and resumed, to the same weights.

    Returns:
        The folder of that run, beside the first.
    """
    folder = Path(straight.checkpoint.output_dir).with_name("killed")
    killed = straight.changed(output_dir=str(folder))
    train_until(killed, step)
    assert max(checkpoint_steps(folder / "checkpoints")) == step - step % straight.checkpoint.save_steps
    train(killed.changed(resume=True))
    assert_equal_weights(Path(straight.checkpoint.output_dir) / "model", folder / "model")
    return folder


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the folder of a run, which hold nothing but JSON: no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def num_rows(folder: str | Path) -> int:
    """The number of rows that a run has written by now."""
    file = Path(folder) / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


PROOF = {
    **dict.fromkeys(("bad_layers", "left_dense", "uncounted", "violations", "non_finite"), 0),
    **{"layers": 14, "weights": 900, "groups": 225, "zero_fraction": 0.5},
}
"""The entry "proof" of a castlm.json."""
CONDITIONS = {
    **{"seq_len": 32, "stride": 32, "text": "a.txt", "text_sha256": "ab", "num_tokens": 99},
    **{"tokenizer": "t", "precision": "fp32"},
}
"""The entry "measured" of a castlm.json, and the conditions of each of its "figures"."""
RUN = {
    "pattern": "2:4",
    "left_dense": {},
    "proof": PROOF,
    "method": "cast",
    "config": {"seed": 3},
    "world_batch": 8,
    "perplexity": {"dense": 3, "pruned": None},
    "figures": [{**CONDITIONS, "name": "dense", "perplexity": 3.0}],
    "measured": CONDITIONS,
    "dataset": {"name": "b.txt", "sha256": "cd"},
    "num_params": 1000,
    "train_tokens": 512,
    "train_steps": 2,
    "train_seconds": 1.5,
    "start": {
        "basis": {"changes": [], "notes": ["a"], "moved": 0.1, "seconds": 2.0},
        "layer_errors": {"a.b": None, "c": 0.5},
    },
    "world_size": 1,
    "machine": "x86_64 cpu",
    "verdict": {"ok": False, "reason": "the perplexity is inf", "problem": "DIVERGED", "remedy": "less"},
}
"""The castlm.json of a run, without `run_id`, `versions` and other entries that no reader needs."""


def record_of(folder: str | Path) -> dict[str, Any]:
    """The castlm.json of a model folder."""
    return json.loads((Path(folder) / "castlm.json").read_text())


def edit_json(file: Path, **fields: Any) -> None:
    """Gives fields of a JSON file, such as config.json, other values; makes the file if it is not there."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | fields))


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors in the safetensors files of a folder, by name."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Lets `change` add, change and remove tensors in the model.safetensors of a folder."""
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SUM_NOISE = 1e-6
"""Largest difference of most weights between two runs whose gradients are sums in another order (1 or 2 ranks, 8 x 1 or
1 x 8 sequences): fp32 gradients then differ by about 1e-6 of the largest of their tensor."""

SUM_NOISE_OF_ADAM = 3e-5
"""Largest difference of any weight between two such runs, at a learning rate of 1e-3 and up to 8 steps.

Adam divides by the size of the gradient, and so amplifies the noise where a gradient is nearly zero. Measured on
`tiny_model("gemma")`: a weight with a gradient of 9e-9, about AdamS's `eps`, moves by 2.1e-6 between one rank and two,
and by 7e-7 between 2 x 6 and 4 x 3 sequences in one process. A weight that gets another rank's row or a token twice
moves by a share of the learning rate, 1e-4 and more."""


def assert_same_but_for_sums(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], atol: float = SUM_NOISE_OF_ADAM
) -> None:
    """Checks that two runs ended alike but for the order in which their gradients were summed.

    99 % of the weights differ by at most `SUM_NOISE`, or a thirtieth of `atol` if that is larger, and none by more than
    `atol`.
    """
    assert ours.keys() == theirs.keys()
    differences = {name: (theirs[name].float() - ours[name].float()).abs() for name in ours}
    for name, difference in differences.items():
        assert difference.max() <= atol, f"{name} differs by {difference.max():.2g}"
    together = torch.cat([difference.flatten() for difference in differences.values()])
    noisy = (together > max(SUM_NOISE, atol / 30)).float().mean()
    assert noisy <= 0.01, f"{noisy:.1%} of the weights differ by more than the noise of a sum"


def assert_same_runs_but_for_sums(one: str | Path, other: str | Path, atol: float = SUM_NOISE_OF_ADAM) -> None:
    """`assert_same_but_for_sums` of two model folders."""
    assert_same_but_for_sums(weights(one), weights(other), atol)


def assert_equal_weights(one: str | Path, other: str | Path) -> None:
    """Checks that the files of two folders hold the same tensors, bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
