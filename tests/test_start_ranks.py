"""A start on several ranks has the bits of a start on one."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from castlm.cli.main import main
from castlm.core.shards import whole
from castlm.models.loading import Place
from castlm.oneshot import ranks as division
from castlm.oneshot.folder import HiddenStates
from castlm.oneshot.steps import solve
from castlm.training import trainer
from castlm.training.config import TrainConfig
from castlm.world import closing, init_world
from tests.ranks import run_ranks, said, start_ranks, wait_ranks
from tests.runs import assert_equal_weights, begin_run, flags, small, weights
from tests.slow import slow
from tests.tiny import save_tiny

# 40 sequences of 64 tokens: three passes, so that the fourth rank has no text.
TEXT = {"seq_len": 64, "calibration_sequences": 40, "per_device_train_batch_size": 1}


def start(config: TrainConfig) -> None:
    """Makes the start of a run, and saves the student's whole weights and masks as they are before step 0."""
    division.MIN_ROWS = 4  # the rows of a tiny layer are divided, too
    with closing(init_world("cpu", "full")) as world:
        run = begin_run(config, world)
        weights = {name: whole(p.detach()).clone() for name, p in run.model.named_parameters()}
        masks = {run.names[p]: whole(mask).clone() for p, mask in run.method.masks().items()}
        if world.is_main:
            torch.save([weights, masks, run.start.layer_errors], Path(config.checkpoint.output_dir).parent / "start.pt")


def start_killed(config: TrainConfig, victim: int) -> None:
    """As `start`, but rank `victim` is killed in the second block, before its output layer is solved."""
    prune_layers, calls = solve.prune_layers, [0]

    def prune_or_die(*args):
        calls[0] += 1
        if calls[0] == 6 and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return prune_layers(*args)

    solve.prune_layers = prune_or_die
    start(config)


def config_of(folder: Path, model: str, text: str, **over) -> TrainConfig:
    folder.mkdir()
    return small(model, text, folder / "run", device="cpu", **TEXT, **over)


def started(config: TrainConfig, ranks: int, start=start) -> tuple[dict[str, str], list]:
    """The hashes of the finished blocks, and what `start` saves."""
    output = Path(config.checkpoint.output_dir)
    run_ranks(start, ranks, config, folder=output.parent)
    files = sorted(Path(f"{output}.partial").glob("block-*.safetensors"))
    assert len(files) > 1
    return {file.name: digest(load_file(file)) for file in files}, torch.load(output.parent / "start.pt")


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


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", {}),
        slow("gemma", {"decay": "proportional", "ignore_decay_budget": True, "start_effort": "quick"}),
        slow("gpt2", {"reconstruct_epochs": 2, "rotate": "off"}),
        slow("qwen3_moe", {}),
        slow("gpt_oss", {"start_effort": "quick", "cross_document_attention": True}),
        *(slow(family, {"start_effort": "quick"}) for family in ("dbrx", "jetmoe", "llama4_text", "longcat_flash")),
    ],
    ids=[
        *("default", "dense values, quick", "reconstructed, transposed in its file", "experts", "experts, transposed"),
        *("DBRX", "JetMoE", "Llama 4", "LongCat"),
    ],
)
def test_a_start_has_the_same_bits_on_1_2_and_4_ranks(family, over, text, tmp_path):
    model = str(save_tiny(tmp_path / "dense", family))
    one, *others = (started(config_of(tmp_path / str(n), model, text, **over), n) for n in (1, 2, 4))
    for other in others:
        assert_same_start(one, other)


def start_counted(config: TrainConfig) -> None:
    """As `start`; saves the bytes that this rank reads for it: of the model by weight, and of hidden states."""
    read: dict[str, int] = {}
    prune, read_place, read_states = trainer.prune_for_start, Place.read, HiddenStates.__getitem__

    def add(name: str, tensor: torch.Tensor) -> torch.Tensor:
        read[name] = read.get(name, 0) + tensor.nbytes
        return tensor

    def counted(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Place, "read", lambda place, *which: add(place.key, read_place(place, *which)))
            patch.setattr(HiddenStates, "__getitem__", lambda states, n: add("states", read_states(states, n)))
            made = prune(*args, **options)
        torch.save(read, Path(config.checkpoint.output_dir).parent / f"read-{os.environ['RANK']}.pt")
        return made

    trainer.prune_for_start = counted
    start(config)


def test_ranks_share_what_a_start_reads(llama, text, tmp_path):
    """A weight of a block is read by one rank for the block; the first one also by all."""
    run_ranks(start_counted, 2, config_of(tmp_path / "run", llama, text), folder=tmp_path)
    of_ranks = [torch.load(tmp_path / "run" / f"read-{rank}.pt") for rank in range(2)]
    stored = {name: tensor.nbytes for name, tensor in weights(llama).items()}
    for name, size in stored.items():
        times = sum(read.get(name, 0) for read in of_ranks) / size
        assert times == {".0.": 3, ".1.": 1}.get(name[12:15], 2 - 2 * name.startswith("lm_head")), name
    in_block = [name for name in stored if ".1." in name]
    shares = [sum(read.get(name, 0) for name in in_block) for read in of_ranks]
    assert max(shares) < 0.7 * sum(stored[name] for name in in_block)
    # batches of 14, 14 and 12 sequences: rank 0 has the first and the last
    states = [read["states"] for read in of_ranks]
    assert 26 / 14 * states[1] <= states[0] < 2.2 * states[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), slow(2, 2), slow(1, 4)])
def test_a_rank_killed_in_a_block_continues_on_any_number_of_ranks_to_the_same_bits(
    before, after, llama, text, tmp_path
):
    straight = started(config_of(tmp_path / "straight", llama, text), 1)
    config = config_of(tmp_path / "killed", llama, text)
    codes = wait_ranks(start_ranks(start_killed, before, config, before - 1, log=tmp_path / "log"))
    assert codes[-1] == -signal.SIGKILL
    assert 0 not in codes
    progress = json.loads((tmp_path / "killed" / "run.partial" / "progress.json").read_text())
    assert progress["done"] == 1
    assert_same_start(straight, started(config, after))


def prune(*options: str) -> int:
    division.MIN_ROWS = 4
    return main(["prune", *options])


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", []),
        slow("llama", ["--rotate=off", "--no-permute"]),
        slow("llama", ["--solver=wanda"]),
        slow("qwen3_moe", []),
    ],
)
def test_ranks_prune_a_folder_together_to_the_bits_of_one(family, over, text, tmp_path):
    model = str(save_tiny(tmp_path / "dense", family))
    sizes = {"calibration_sequences": 40, "seq_len": 64, "memory": "block"}
    for ranks in (1, 2, 4) if family == "qwen3_moe" else (1, 2):
        options = [*flags({"model": model, "calibration": text, "output_dir": tmp_path / str(ranks), **sizes}), *over]
        run_ranks(prune, ranks, *options, folder=tmp_path)
        assert_equal_weights(tmp_path / "1", tmp_path / str(ranks))
    assert not list(tmp_path.glob("*.partial"))
    codes = wait_ranks(start_ranks(prune, 2, *options, "--overwrite", "--memory=model", log=tmp_path / "log"))
    assert codes == [2, 2]
    assert "--memory model takes the whole model in one process, not 2 ranks" in said(tmp_path / "log", 1)
