"""A start on several ranks has the bits of a start on one."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from castlm.core.shards import whole
from castlm.distributed.world import closing, init_world
from castlm.oneshot import ranks as division
from castlm.training.config import TrainConfig
from tests.ranks import run_ranks
from tests.runs import begin_run, small

# 40 sequences of 64 tokens: three passes, so that the fourth rank has no text.
TEXT = {"seq_len": 64, "calibration_sequences": 40, "per_device_train_batch_size": 1}


def start(config: TrainConfig) -> None:
    """Makes the start of a run, and saves the student's whole weights and masks as they are before step 0."""
    division.LEAST_ROWS = 4  # the rows of a tiny layer are divided, too
    with closing(init_world("cpu", "full")) as world:
        run = begin_run(config, world)
        weights = {name: whole(p.detach()).clone() for name, p in run.model.named_parameters()}
        masks = {run.names[p]: whole(mask).clone() for p, mask in run.method.masks().items()}
        if world.is_main:
            torch.save([weights, masks, run.start["layer_errors"]], Path(config.checkpoint.output_dir) / "start.pt")


def started(folder: Path, ranks: int, model: str, text: str, **over) -> tuple[dict[str, str], list]:
    config = small(model, text, folder / "run", device="cpu", **TEXT, **over)
    folder.mkdir()
    run_ranks(start, ranks, config, folder=folder)
    files = sorted((folder / "run.partial").glob("block-*.safetensors"))
    assert files
    hashes = {file.name: digest(load_file(file)) for file in files}
    return hashes, torch.load(folder / "run" / "start.pt")


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def assert_same_start(one, other) -> None:
    assert one[0] == other[0]
    for ours, theirs in zip(one[1][:2], other[1][:2]):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    assert one[1][2] == other[1][2]


def test_a_start_has_the_same_bits_on_1_2_and_4_ranks(llama, text, tmp_path):
    one = started(tmp_path / "1", 1, llama, text)
    for ranks in (2, 4):
        assert_same_start(one, started(tmp_path / str(ranks), ranks, llama, text))
