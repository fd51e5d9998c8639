"""Several gloo ranks against one: the same weights, checkpoints that any number of ranks continues from, and faults."""

import copy
import errno
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

import castlm.training.train as training
from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.scaling import add_weight_scaling
from castlm.core.shards import local, whole
from castlm.core.sparsify import sparse_linears, sparse_param_groups, weight_parameter
from castlm.data.packing import BatchLoader
from castlm.distributed import export
from castlm.distributed.sharding import shard_
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.models.loading import fingerprint, load_rows_, materialize_, open_sharded
from castlm.signals import Interrupt, stopped_by_sigterm
from castlm.training import checkpoint, finish, start
from castlm.training import model as opening
from castlm.training.checkpoint import checkpoint_steps
from castlm.training.config import TrainConfig
from castlm.training.objective import Objective, as_teacher_, pruned
from castlm.training.train import train
from castlm.training.trainer import Trainer
from castlm.world import World, close_world, closing, init_world, interface_to
from tests.faults import (
    Ground,
    check_hang,
    check_kill,
    check_kill_in_start,
    check_sigterm,
    check_torchrun,
    train_as_a_command,
)
from tests.ranks import assert_pruned_alike, masks_after_steps, run_ranks, said, small, start_ranks, wait_ranks
from tests.runs import (
    assert_equal_weights,
    assert_same_runs_but_for_sums,
    edit_json,
    metrics,
    record_of,
    train_until,
    weights,
)
from tests.slow import slow, slow_but
from tests.tiny import EXPERTS, FAMILIES, save_tiny, tiny_model, tiny_tokenizer

START = {"init_from": "magnitude"}
"""The start whose masked weights decay from dense values. From the default one, SparseGPT, they start at zero."""
AS_PUBLISHED = {**START, "cross_document_attention": True}


# ---------------------------------------------------------------------- N ranks = 1 rank


def train_uneven(config: TrainConfig) -> None:
    """Trains with labels that do not count, more of them in one rank than in the other, and keeps the last masks."""
    original_next, original_finish = BatchLoader.__next__, training.finish

    def next_with_ignored_labels(self: BatchLoader) -> dict[str, torch.Tensor]:
        batch = original_next(self)
        labels = batch["labels"].clone()
        labels[labels % 5 == batch["input_ids"][:, :1] % 5] = -100
        labels[batch["input_ids"][:, 0] % 3 == 0, 8:] = -100
        return batch | {"labels": labels}

    def keep_masks(run: Trainer) -> dict[str, Any]:
        masks = {run.names[p]: whole(mask) for p, mask in run.method.masks().items()}
        if run.world.is_main:
            torch.save(masks, run.folder.path / "masks.pt")
        return original_finish(run)

    BatchLoader.__next__, training.finish = next_with_ignored_labels, keep_masks
    train(config)


@pytest.fixture(scope="module")
def one_rank_run(request, gemma, text, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The options of a start, the default or the one whose masks are refreshed, and the run with it on one rank."""
    over = {} if request.param == "default" else START
    folder = tmp_path_factory.mktemp("one")
    run_ranks(train_uneven, 1, small(gemma, text, folder / "run", 1, **over), folder=folder)
    return over, folder / "run"


@pytest.mark.parametrize(
    ("sharding", "ranks", "per_node", "one_rank_run"),
    [
        ("full", 2, 2, "default"),
        slow("full", 4, 4, "magnitude"),
        slow("full", 3, 3, "magnitude"),
        slow("replicate", 2, 2, "default"),
        slow("hybrid", 4, 2, "magnitude"),
    ],
    indirect=["one_rank_run"],
)
def test_ranks_are_one_rank(sharding, ranks, per_node, one_rank_run, gemma, text, tmp_path):
    """Teacher, weight scaling, tied embeddings, clipping, accumulation, evaluation, uneven counts and uneven shards."""
    over, one_rank = one_rank_run
    config = small(gemma, text, tmp_path / "run", ranks, sharding=sharding, **over)
    environment = {"LOCAL_WORLD_SIZE": str(per_node)}
    run_ranks(train_uneven, ranks, config, folder=tmp_path, environment=environment)

    if sharding == "full" and ranks != 3:  # passes of as many sequences
        assert_equal_weights(one_rank / "model", tmp_path / "run" / "model")
    assert_same_runs_but_for_sums(one_rank / "model", tmp_path / "run" / "model")
    assert verify(tmp_path / "run" / "model").ok
    one, other = metrics(one_rank), metrics(tmp_path / "run")
    assert max(row["grad_norm"] for row in one if "loss" in row) > 1.0  # clipping had work to do
    assert len(one) == len(other)
    for expected, row in zip(one, other):
        for key in ("tokens", "loss", "ce", "kl", "grad_norm", "perplexity", "prune_now_ppl", "flip_rate"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    masks, expected = torch.load(tmp_path / "run" / "masks.pt"), torch.load(one_rank / "masks.pt")
    for name, mask in expected.items():
        assert torch.equal(masks[name], mask), name
    histogram = record_of(tmp_path / "run" / "model")["masked_histogram"]
    assert histogram["zeros"] + sum(histogram["counts"]) == 18_432 // 2  # each masked weight counts once


def train_on_dtensors() -> None:
    """AdamS on row shards, some of them uneven and one empty, bit for bit as on the whole weights."""
    world = init_world("cpu", "full")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(8, 5), nn.Linear(5, 12), nn.Linear(12, 1)])

    plain, sharded = model(), model()
    for layer in sharded:
        fully_shard(layer, mesh=world.mesh)
    options: dict[str, Any] = {"lr": 1e-2, "total_steps": 8, "mask_interval": 2, "decay_end": 1.0}
    optimizers = [AdamS(sparse_param_groups(m), **options) for m in (plain, sharded)]
    one, other = masks_after_steps(plain, sharded, optimizers, world.mesh, 6)
    assert len(one) == 2
    assert all(shard.dtype == torch.bool and shard.placements == (Shard(0),) for shard in other.values())

    before = [local(p.detach()).clone() for p in sharded.parameters()]
    with pruned({local(p.data): local(mask) for p, mask in other.items()}):
        assert all((whole(p) == 0)[~mask].all() for p, mask in zip(other, one.values()))
    assert all(torch.equal(local(p), b) for p, b in zip(sharded.parameters(), before))
    assert_pruned_alike(plain, sharded, (one, other))

    columns = nn.Parameter(distribute_tensor(torch.randn(4, 8), world.mesh, [Shard(1)]))
    with pytest.raises(InputError, match="splits groups of 2:4"):
        AdamS([{"params": [columns], "sparse": True}], total_steps=10)
    close_world(world)


def test_adams_on_shards_is_adams_on_whole_weights(tmp_path):
    run_ranks(train_on_dtensors, 2, folder=tmp_path)


class Experts(nn.Module):
    """Experts in a list, of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])

    def forward(self, x: torch.Tensor, chosen: int) -> torch.Tensor:
        return x + self.experts[chosen](x).square().sum()


class OfExperts(nn.Module):
    """Two transformer blocks of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, x: torch.Tensor, chosen: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, chosen)
        return x.square().mean()


def call_other_experts() -> None:
    """Each rank calls another expert: its gradient is the average over the ranks, although the others have none."""
    world = init_world("cpu", "full")
    torch.manual_seed(0)
    plain = OfExperts()
    sharded = copy.deepcopy(plain)
    shard_(sharded, world)
    x = torch.randn(3, 8)
    (sum(plain(x, rank) for rank in range(world.size)) / world.size).backward()
    sharded(x, world.rank).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(whole(parameter.grad), expected[name].grad, msg=name)
    close_world(world)


def test_experts_in_a_list_get_their_own_gradients(tmp_path):
    run_ranks(call_other_experts, 2, folder=tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_after_an_exception_the_group_of_gpus_is_not_destroyed(device, monkeypatch):
    """Destroying it waits for ranks that may wait for this one."""
    left = []
    monkeypatch.setattr("castlm.world.close_world", left.append)
    world = World(0, 2, torch.device(device), None)
    with closing(world) as same:
        assert same is world
    assert left == [world]
    with pytest.raises(RuntimeError), closing(world):
        raise RuntimeError("CUDA out of memory")
    assert left == [world] * (2 if device == "cpu" else 1)


def test_the_way_to_other_nodes_is_never_an_address_of_this_machine_alone():
    """The loopback interface is what gloo takes for a host name that means 127.0.1.1; None leaves the choice to it."""
    for address in ("127.0.1.1", "127.0.0.1", "no-such-host.invalid"):
        assert interface_to(address) != "lo"


def test_a_signal_under_torchrun_promises_no_save_and_names_the_likely_reason(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    Interrupt()._handle(signal.SIGTERM, None)
    assert "saved if every rank still answers" in capsys.readouterr().err
    assert "one of them has ended" in stopped_by_sigterm()
    monkeypatch.delenv("WORLD_SIZE")
    assert stopped_by_sigterm() == "stopped by SIGTERM"


CALIBRATED = {"init_from": "sparsegpt", "calibration_sequences": 8, "max_steps": 4, "eval_steps": 4}


@pytest.fixture(scope="module")
def calibrated_run(gemma, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    run_ranks(train, 1, small(gemma, text, folder / "run", 1, **CALIBRATED), folder=folder)
    return folder / "run"


@pytest.mark.parametrize("stored", [slow("sharded"), "whole"])
def test_ranks_start_from_sparsegpt_as_one_rank_does(stored, calibrated_run, gemma, text, tmp_path):
    """Rank 0 prunes, as a model with experts; where each rank can read its rows alone, it loads the model for it
    ("sharded"), which then takes longer than `timeout_s`."""
    config = small(gemma, text, tmp_path / "run", 3, timeout_s=5, **CALIBRATED)
    run_ranks(train_after_a_slow_start, 3, config, stored == "whole", folder=tmp_path)
    assert_same_runs_but_for_sums(calibrated_run / "model", tmp_path / "run" / "model")
    one, other = (record_of(run / "model") for run in (calibrated_run, tmp_path / "run"))
    assert other["mask"]["initial_flip_rate"] == 0
    for name in ("dense", "one_shot", "pruned"):
        assert other["perplexity"][name] == pytest.approx(one["perplexity"][name], rel=1e-5), name


def train_after_a_slow_start(config: TrainConfig, whole_model: bool) -> None:
    """Trains; loading the model to prune takes longer than `timeout_s`, or the model is whole on each rank."""
    load = opening.load_model

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.1 * config.runtime.timeout_s)
        return load(*args, **kwargs)

    start._why_one_rank = lambda *args: "of a test"
    if whole_model:
        opening.open_sharded = lambda *args, **kwargs: None
    else:
        opening.load_model = slowly
    train(config)


def train_on_a_disk_of_its_own(config: TrainConfig, folder: Path) -> int:
    """Trains where a relative name is another folder on each rank, as on the local disks of several nodes."""
    here = folder / os.environ["RANK"]
    here.mkdir(exist_ok=True)
    os.chdir(here)
    return train_as_a_command(config)


def assert_refused(log: Path, message: str, function: Callable[..., int], *args: Any) -> None:
    """Both ranks end with exit code 2; one line says why, and the other rank has no other."""
    assert wait_ranks(start_ranks(function, 2, *args, log=log), 60) == [2, 2]
    errors = said(log, 2)
    assert re.search(message, errors), errors
    assert len({line for line in errors.splitlines() if line.startswith("castlm: error: ")}) == 1
    assert "Traceback" not in errors


def test_an_output_folder_that_ranks_do_not_share_is_refused(gemma, text, tmp_path):
    config = small(gemma, text, Path("run"), 2, timeout_s=10)
    assert_refused(
        tmp_path / "log", "rank 1 .* output folder run of rank 0", train_on_a_disk_of_its_own, config, tmp_path
    )
    assert not (tmp_path / "0" / "run").exists()


@pytest.mark.parametrize("sharding", ["full", "whole copies"])
def test_ranks_with_other_weights_of_the_model_are_refused(sharding, text, tmp_path):
    for rank in range(2):
        save_tiny(tmp_path / str(rank) / "model", "llama", seed=rank)
    whole = {"sharding": "replicate", "adapter": "shira", "eta": 0.0, "method": "finetune", "init_from": "model"}
    config = small("model", text, tmp_path / "run", 2, **(START if sharding == "full" else whole))
    message = "rank 1 has (another|other) .* ?of model"
    assert_refused(tmp_path / "log", message, train_on_a_disk_of_its_own, config, tmp_path)


def test_a_failure_of_the_main_rank_alone_is_one_line(gemma, text, tmp_path):
    config = small(gemma, text, tmp_path / "run", 2, init_from=gemma)
    assert_refused(tmp_path / "log", r"is not 2:4 in model\.layers\.0", train_as_a_command, config)


def train_with_a_defect_on_the_main_rank(config: TrainConfig) -> int:
    recording = Trainer.recording

    def broken(self: Trainer) -> Any:
        if self.world.is_main:
            raise RuntimeError("two shapes that do not fit")
        return recording(self)

    Trainer.recording = broken
    return train_as_a_command(config)


def test_an_error_of_a_rank_is_not_taken_for_the_end_of_another(gemma, text, tmp_path):
    log = tmp_path / "log"
    config = small(gemma, text, tmp_path / "run", 2, **START)
    assert wait_ranks(start_ranks(train_with_a_defect_on_the_main_rank, 2, config, log=log), 60) == [1, 2]
    assert "rank 1" not in (own := Path(f"{log}.0").read_text())
    assert "two shapes that do not fit" in own
    assert "rank 0" in Path(f"{log}.1").read_text()


# ---------------------------------------------------------------------- the run checks itself


def test_a_mask_that_is_not_its_weights_stops_the_run(gemma, text, tmp_path, monkeypatch):
    refresh = AdamS.refresh_masks

    def shifted(self, group):  # as if the masks of a flattened parameter began one group too late
        flips = refresh(self, group)
        param = group["params"][-1]
        self.set_mask(param, self.mask(param).roll(4))
        return flips

    monkeypatch.setattr(AdamS, "refresh_masks", shifted)
    with pytest.raises(RuntimeError, match=r"mask of model\.layers\.1"):
        train(small(gemma, text, tmp_path / "run", 1, **START))


def test_a_weight_that_is_not_stepped_stops_the_run(gemma, text, tmp_path, monkeypatch):
    step_group = AdamS.step_group
    monkeypatch.setattr(
        AdamS, "step_group", lambda self, group, params: None if group["sparse"] else step_group(self, group, params)
    )
    with pytest.raises(RuntimeError, match=r"0 .*18,432"):
        train(small(gemma, text, tmp_path / "run", 1))


# ---------------------------------------------------------------------- checkpoints


RESUMED: dict[str, Any] = {"max_steps": 6, "decay_end": 0.75}


@pytest.fixture(scope="module")
def straight_run(gemma, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(small(gemma, text, folder / "run", 1, **RESUMED))
    return folder / "run"


@pytest.mark.parametrize(
    ("straight", "over", "stops"),
    [
        pytest.param("straight_run", RESUMED, [(2, 2, "full"), (1, 6, "full")], id="defaults"),
        slow("straight_run", RESUMED, [(2, 2, "full"), (1, 4, "full"), (4, 6, "hybrid")], id="hybrid"),
        slow("calibrated_run", {**CALIBRATED, "async_save": False}, [(1, 2, "full"), (2, 4, "full")], id="calibrated"),
    ],
)
def test_resumed_on_other_numbers_of_ranks(straight, over, stops, gemma, text, tmp_path, request):
    straight = request.getfixturevalue(straight)
    for ranks, stop, sharding in stops:
        fields = {"save_steps": 2, "resume": stop > 2, "sharding": sharding, **over}
        config = small(gemma, text, tmp_path / "run", ranks, **fields)
        start = (train, ranks, config) if stop == config.optimizer.max_steps else (train_until, ranks, config, stop)
        run_ranks(*start, folder=tmp_path, environment={"LOCAL_WORLD_SIZE": min(ranks, 2)})
        saved = checkpoint_steps(tmp_path / "run" / "checkpoints")
        assert max(saved) == stop
        assert len(list(saved[stop].glob("shard-*"))) == (2 if sharding == "hybrid" else ranks)
    if all(sharding == "full" for *_, sharding in stops):
        assert_equal_weights(straight / "model", tmp_path / "run" / "model")
    assert_same_runs_but_for_sums(straight / "model", tmp_path / "run" / "model")
    one, other = metrics(straight), metrics(tmp_path / "run")
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for expected, row in zip(one, other):
        for key in ("tokens", "loss", "perplexity", "initial_flip_rate", "flip_rate"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-6), key


def fail_at(config: TrainConfig, rank: int, step: int) -> int:
    """Trains; the disk is full when `rank` writes at `step`."""

    def failing(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if f"step-{step:08d}" in str(file) and dist.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file)

    checkpoint.save_file = failing
    return train_as_a_command(config)


@pytest.mark.parametrize("background", [True, slow(False)])
def test_a_rank_that_cannot_write_stops_all_with_the_last_checkpoint_whole(background, gemma, text, tmp_path):
    config = small(gemma, text, tmp_path / "run", 2, max_steps=6, save_steps=2, eval_steps=6, async_save=background)
    assert_refused(tmp_path / "log", "step 4 could not be saved .* disk is full", fail_at, config, 1, 4)
    folder = tmp_path / "run" / "checkpoints"
    assert list(checkpoint_steps(folder)) == [2]
    assert not list(folder.glob(".step*"))
    if background:
        run_ranks(train, 2, config.changed(resume=True), folder=tmp_path)  # and continues from it
        assert verify(tmp_path / "run" / "model").ok


# ---------------------------------------------------------------------- export


def export_in_small_files(config: TrainConfig, damage: bool = False) -> int:
    export.MAX_SHARD_BYTES = 20_000
    write_all_but_weights = export.write_all_but_weights

    def damaging(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
        write_all_but_weights(model, tokenizer, folder, dtype)
        file = sorted(folder.glob("*.safetensors"))[-1]
        state = load_file(file)
        name = max(state, key=lambda key: state[key].ndim)
        state[name] *= 2  # as sparse as before
        save_file(state, file, metadata={"format": "pt"})

    if damage:
        export.write_all_but_weights = damaging
    return train_as_a_command(config)


def write_weights_alone(dense: str, folder: str, sharding: str) -> None:
    """Only the weights of a model with trained scales, in small files; counts those that this rank writes."""
    export.MAX_SHARD_BYTES = 9_000
    world = init_world("cpu", sharding)
    model = load_model(dense).model
    add_weight_scaling(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.shape[-1] == 2:
            parameter.data = torch.rand(parameter.shape, generator=generator)
    if world.size > 1:
        shard_(Objective(model), world)
    write_file, written = export.write_file, []
    export.write_file = lambda file, *rest: (written.append(file.name), write_file(file, *rest))
    Path(folder).mkdir(exist_ok=True)
    export._write_weights(SimpleNamespace(model=model, world=world, dtype=torch.bfloat16), Path(folder))
    counts = world.gather(len(written))
    assert max(counts) - min(counts) <= 1, counts
    close_world(world)


@pytest.mark.parametrize(("size", "sharding"), [(2, "full"), slow(4, "full"), slow(4, "hybrid")])
def test_each_rank_writes_whole_files_with_the_bits_of_one_rank(size, sharding, tmp_path, monkeypatch):
    for name in ("MAX_SHARD_BYTES", "write_file"):
        monkeypatch.setattr(export, name, getattr(export, name))  # restored at the end
    dense = str(save_tiny(tmp_path / "dense", "gpt2", intermediate_size=80))
    write_weights_alone(dense, str(tmp_path / "1"), "full")
    nodes = {"LOCAL_WORLD_SIZE": "2" if sharding == "hybrid" else str(size)}
    run_ranks(write_weights_alone, size, dense, str(tmp_path / "n"), sharding, folder=tmp_path, environment=nodes)
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("1", "n"))
    assert len(one) > 5
    assert one == other


GENERATION = {"do_sample": False, "temperature": 0.6, "eos_token_id": [7, 256], "max_new_tokens": 5}
"""Settings that transformers warns about and would not save if they were built again."""


def train_and_gather(config: TrainConfig) -> int:
    finish.is_remote_code = lambda model: True  # such a model is written from the memory of one rank
    return train_as_a_command(config)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "run"), [("gpt2", export_in_small_files), ("llama", train_and_gather)])
def test_an_export_of_ranks_is_as_transformers_writes_it(family, run, text, tmp_path):
    """Several files, Conv1D in its own layout, ties, the dtype, the generation config."""
    dense = save_tiny(tmp_path / "dense", family)
    (dense / "generation_config.json").write_text(json.dumps(GENERATION))
    expected = {name: tensor.bfloat16() for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(expected, dense / "model.safetensors", metadata={"format": "pt"})
    edit_json(dense / "config.json", dtype="bfloat16")
    run_ranks(run, 2, small(str(dense), text, tmp_path / "run", 2, max_steps=2), folder=tmp_path)
    folder, is_tied = tmp_path / "run" / "model", family == "gpt2"
    written = json.loads((folder / "generation_config.json").read_text())
    assert {name: written.get(name) for name in GENERATION} == GENERATION
    report = verify(folder)
    assert report.ok
    assert len(report.sparse_layers) == (8 if family == "gpt2" else 14)
    if run is export_in_small_files:
        assert len(list(folder.glob("*.safetensors"))) > 2
    stored = weights(folder)
    kinds = ({name: (tensor.shape, tensor.dtype) for name, tensor in of.items()} for of in (stored, expected))
    assert next(kinds) == next(kinds)
    record = record_of(folder)
    assert record["dtype"] == json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert record["proof"]["tensors_equal_in_bits"] == len(stored) + is_tied  # the tied head is compared too
    from_disk = record["proof"]["perplexity_from_disk"]
    assert from_disk == pytest.approx(record["perplexity"]["pruned"], rel=1e-2)  # of weights rounded to bf16
    assert (folder / "README.md").is_file()


@pytest.mark.slow
def test_export_that_is_not_what_is_in_memory_is_refused(gemma, text, tmp_path):
    config = small(gemma, text, tmp_path / "run", 2, max_steps=2)
    assert_refused(tmp_path / "log", "has other values in the files", export_in_small_files, config, True)
    assert not (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------------- faults; `python -m tests.faults` has them all


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground.prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("victims", "during_save"), [([1], True), slow([0, 1], False)])
def test_killed_ranks_come_home_bit_for_bit(victims, during_save, ground):
    check_kill(ground, 1, victims, during_save)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_ranks_killed_in_the_start_come_home_bit_for_bit(victims, ground):
    check_kill_in_start(ground, victims)


@pytest.mark.slow
def test_torchrun_restarts_a_run_killed_in_its_start_and_later(ground):
    check_torchrun(ground)


def test_sigterm_to_one_rank_saves_and_ends_all_with_0(ground):
    check_sigterm(ground, [1])


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(ground):
    check_hang(ground, 1, timeout_s=4)


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_the_fingerprint_is_of_every_weight_and_of_its_shape(family):
    """And not of its dtype."""
    model = tiny_model(family)
    found = {fingerprint(model)}
    stored = model.state_dict()
    for name, tensor in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in stored)]:
        flat = tensor.detach().view(-1)  # the last weight, as a fine-tuning could leave the first ones alone
        old = flat[-1].item()
        flat[-1] = old + 0.5
        found.add(fingerprint(model))
        flat[-1] = old
        assert len(found) > 1, name
    names = {name for name, _ in model.named_parameters()}
    assert len(found) >= 1 + len(names)
    assert fingerprint(model) in found
    before = fingerprint(model.bfloat16())
    assert fingerprint(model.float()) == before
    norm = next(module for module in model.modules() if "norm" in type(module).__name__.lower())
    norm.weight = torch.nn.Parameter(norm.weight[None].detach())
    assert fingerprint(model) != before


def fingerprint_of_ranks(folder: str, other: str, odd: int) -> None:
    """Writes the fingerprint that this rank finds, or its error; the rank `odd` reads other files."""
    world = init_world("cpu", "full")
    opened = open_sharded(other if world.rank == odd else folder, trust_remote_code=False, revision=None)
    assert opened is not None
    try:
        found = opened[1].fingerprint(world)
    except (InputError, SystemExit) as error:
        found = str(error)
    Path(folder, f"found-{world.rank}").write_text(found)
    close_world(world)


@pytest.mark.parametrize("odd", [None, slow(0), 1, slow(2)])
def test_ranks_share_the_hashing_and_notice_other_weights(odd, tmp_path):
    one, other = (save_tiny(tmp_path / str(seed), seed=seed) for seed in range(2))
    run_ranks(fingerprint_of_ranks, 3, str(one), str(other), odd, folder=tmp_path)
    found = [(one / f"found-{rank}").read_text() for rank in range(3)]
    if odd is None:
        assert found == [fingerprint(load_model(str(one)).model)] * 3
    else:
        assert str(one) in found[0] or str(other) in found[0]
        assert found[1:] == ["2", "2"]  # `SystemExit`: only rank 0 reports it


def test_a_weight_that_is_not_finite_is_found_before_the_work(tmp_path):
    model = save_tiny(tmp_path)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][-1, -1] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    opened = open_sharded(str(model), trust_remote_code=False, revision=None)
    with pytest.raises(InputError, match=f"{name} .*NaN"):
        opened[1].fingerprint(init_world("cpu", "full"))


@pytest.mark.parametrize("family", slow_but(("llama", "gpt2", "gpt_oss"), [*FAMILIES, *EXPERTS]))
def test_what_is_read_row_by_row_is_the_loaded_model_and_has_its_fingerprint(family, tmp_path):
    """From several files, whose rows have more and fewer than 64 numbers."""
    tiny_model(family, intermediate_size=80).save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, checkpoint = open_sharded(str(tmp_path), trust_remote_code=False, revision=None)
    model, expected = loaded.model, load_model(str(tmp_path)).model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert checkpoint.fingerprint(init_world("cpu", "full")) == fingerprint(expected)
    materialize_(model, torch.device("cpu"))
    load_rows_(model, checkpoint, init_world("cpu", "full"))
    found, right = ({**m.state_dict(), **dict(m.named_buffers())} for m in (model, expected))
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert len(dict(model.named_parameters())) == len(dict(expected.named_parameters()))  # tied weights stay tied


def see_what_is_gathered(folder: str) -> None:
    """Whatever the blocks compute in fp32 on one rank stays fp32 on several; the gradients are fp32."""
    world = init_world("cpu", "full")
    model = load_model(folder).model
    teacher = as_teacher_(copy.deepcopy(model), torch.bfloat16)
    add_weight_scaling(model)
    objective = Objective(model, teacher, 0.5)
    shard_(objective, world, "bf16")
    held = sum(local(parameter).numel() for parameter in objective.parameters())
    assert held <= 0.51 * sum(parameter.numel() for parameter in objective.parameters())
    seen: dict[str, torch.dtype] = {}

    def look(name: str, module: nn.Module) -> None:
        seen.update({f"{name}.{leaf}": parameter.dtype for leaf, parameter in module.named_parameters(recurse=False)})
        if is_parametrized(module, "weight"):  # a scaled layer does not call the list of its parametrizations
            seen[f"{name}.parametrizations.weight.original"] = weight_parameter(module).dtype

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))
    ids = torch.randint(0, 256, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(ids, ids, 32).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    assert seen.keys() >= {name for name in parameters if "lm_head" not in name}
    linear = {f"{name}.parametrizations.weight.original" for name in sparse_linears(model)[0]}
    biases = {f"{name}.bias" for name in sparse_linears(model)[0]} & parameters.keys()
    ends = {"model.embed_tokens.weight"} & parameters.keys() if "lm_head.weight" in parameters else set()
    assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == linear | biases | ends
    assert all(parameter.grad.dtype == parameter.dtype == torch.float32 for parameter in parameters.values())
    close_world(world)


@pytest.mark.parametrize("family", ["llama", slow("gpt2"), slow("mixtral")])
def test_blocks_are_gathered_in_bf16(family, tmp_path):
    model = save_tiny(tmp_path / "model", family, **({"num_key_value_heads": 4} if family == "mixtral" else {}))
    run_ranks(see_what_is_gathered, 2, str(model), folder=tmp_path)


def compare_gradients_of_ends(folder: str) -> None:
    world = init_world("cpu", "full")
    model = load_model(folder).model
    ids, gradients = torch.arange(32).view(2, 16), []
    for is_sharded in (False, True):
        student, teacher = copy.deepcopy(model), as_teacher_(copy.deepcopy(model), torch.float32)
        objective = Objective(student, teacher, 0.5)
        if is_sharded:
            shard_(objective, world)
        objective(ids, ids.roll(-1), 32).loss.backward()
        if is_sharded:
            for end in (student.lm_head, student.model.embed_tokens, teacher.lm_head, teacher.model.embed_tokens):
                assert isinstance(end.weight, DTensor), "it is whole outside of its use"
        gradients.append({name: whole(parameter.grad) for name, parameter in student.named_parameters()})
    plain, sharded = gradients
    for name, expected in plain.items():
        torch.testing.assert_close(sharded[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    close_world(world)


def test_untied_embeddings_and_heads_are_whole_only_while_they_are_used(tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    run_ranks(compare_gradients_of_ends, 2, str(model), folder=tmp_path)


@pytest.mark.parametrize("fault", ["NaN", "missing"])
def test_bad_weights_are_refused_by_every_rank(fault, text, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[-1, -1] = float("nan")  # a row of the last rank
    state = {k: v for k, v in model.state_dict().items() if fault == "NaN" or not k.endswith("1.mlp.down_proj.weight")}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = small(str(tmp_path / "model"), text, tmp_path / "run", 2)
    message = {"NaN": "mlp.down_proj.weight .* holds NaN", "missing": "lacks model.layers.1.mlp"}[fault]
    assert_refused(tmp_path / "log", message, train_as_a_command, config)
