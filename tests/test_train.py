"""The loop end to end on tiny models: the result, exact resume, equivalences, and every way to be told no."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.errors import DivergedError, InputError
from castlm.core.sparsify import weight_parameter
from castlm.data import tokens
from castlm.data.calibration import draw_calibration
from castlm.data.tokens import token_ids
from castlm.export.verify import verify
from castlm.facts import Facts
from castlm.files.output import begin_output
from castlm.files.record import LOCK
from castlm.methods.table import METHODS, Method
from castlm.models.io import load_model
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.options import BasisOptions, Refinements, part_of
from castlm.signals import Interrupt, Interrupted, ending_on_sigterm
from castlm.training import checkpoint, start
from castlm.training.checkpoint import checkpoint_steps
from castlm.training.config import TrainConfig
from castlm.training.objective import pruned
from castlm.training.train import train
from castlm.training.trainer import Trainer
from castlm_runtime import library
from tests.ranks import start_command, wait_for, wait_ranks
from tests.refusals import assert_refused
from tests.runs import (
    assert_equal_weights,
    assert_same_runs_but_for_sums,
    before_step,
    begin_run,
    metrics,
    num_rows,
    record_of,
    small,
    small_command,
    stop_and_resume,
    take_steps,
    train_until,
)
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, TEXT, save_tiny, tiny_tokenizer


@pytest.mark.parametrize("family", slow_but(("qwen3", "gpt2"), FAMILIES))
def test_every_family_ends_proved(family, text, tmp_path):
    model = save_tiny(tmp_path / "dense", family)
    facts = train(small(str(model), text, tmp_path / "run", max_steps=4))
    folder = tmp_path / "run" / "model"
    assert verify(folder).ok
    assert Facts.read(folder).proof == facts.proof
    assert facts.perplexity.pruned == pytest.approx(facts.proof.perplexity_from_disk, rel=1e-5)
    assert facts.mask.largest_masked == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 5))
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == family


@pytest.mark.parametrize(
    ("level", "pattern", "named"),
    [
        ("avx2", "2:4", "8:16"),
        ("amx", "16:32", ""),
    ],
)
def test_a_run_names_longer_groups_where_they_are_as_fast(
    level, pattern, named, llama, text, tmp_path, capsys, monkeypatch
):
    facts = {each["name"]: each for each in library._level_facts(library.built())}
    monkeypatch.setattr(library, "_level_facts", lambda _: {library.built().castlm_level(): facts[level]})
    train(small(llama, text, tmp_path / "run", init_from="magnitude", max_steps=2, pattern=pattern))
    noted = capsys.readouterr().err
    assert (f"--pattern {named} " in noted) == bool(named)
    assert noted.count("--pattern") == bool(named)


def test_accumulation_is_one_large_batch(llama, text, tmp_path):
    common = {"eta": 0.5, "max_steps": 3, "decay_end": 1.0, "init_from": "magnitude"}
    train(small(llama, text, tmp_path / "a", per_device_train_batch_size=8, **common))
    train(small(llama, text, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **common))
    assert_same_runs_but_for_sums(tmp_path / "a" / "model", tmp_path / "b" / "model")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"init_from": "magnitude", "async_save": False, "moments": "8bit"},
        slow({"rotate": "values", "reconstruct_epochs": 1}),
        slow({"method": "ast"}),
        slow({"method": "finetune"}),
        slow({"method": "gradual_magnitude"}),
        slow({"method": "dense"}),
        {"method": "dense", "weight_bits": 3},
        slow({"weight_bits": 3}),
        slow({"weight_bits": 3, "moments": "8bit"}),
    ],
)
def test_resumed_run_is_the_straight_run_bit_for_bit(fields, llama, text, tmp_path):
    straight = small(llama, text, tmp_path / "straight", **fields, save_steps=5)
    train(straight)
    killed = straight.changed(output_dir=str(stop_and_resume(straight, 7)), resume=True)
    rows = [metrics(tmp_path / name) for name in ("straight", "killed")]
    of_the_machine = ("tokens_per_s", "eta_s", "peak_memory_bytes")
    one, other = ([{k: v for k, v in row.items() if k not in of_the_machine} for row in r] for r in rows)
    assert one == other
    train(killed)  # a finished run is left alone


def test_a_run_is_not_resumed_with_other_options_data_or_weights(tmp_path):
    model, data = save_tiny(tmp_path / "model"), tmp_path / "data.txt"
    data.write_text(TEXT)
    config = small(str(model), str(data), tmp_path / "run", save_steps=2)
    train_until(config, 3)
    again = config.changed(resume=True)
    changes = {"max_steps": {"max_steps": 13}, "seed": {"seed": 1}, "world_batch": {"per_device_train_batch_size": 2}}
    for named, change in changes.items():
        with pytest.raises(InputError, match=named):
            train(again.changed(**change))
    data.write_text(TEXT + "More.")
    with pytest.raises(InputError, match=r"eval_sha256|dataset_sha256"):
        train(again)
    data.write_text(TEXT)
    save_tiny(model, seed=1)
    with pytest.raises(InputError, match=r"model_fingerprint"):
        train(again)


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_step_1(name, text, tmp_path, monkeypatch):
    """Its special tokens alone are outside the vocabulary, and none of them is in the evaluation text."""
    model, tokenizer = save_tiny(tmp_path / "model"), tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(20)])
    tokenizer.add_special_tokens({name: "<far>"})
    monkeypatch.setattr(tokens, "_END_OF_TEXT", ())  # which the tiny tokenizer has too
    if name == "bos_token":
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<far> $A", special_tokens=[("<far>", tokenizer.convert_tokens_to_ids("<far>"))]
        )
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=rf"token id {tokenizer.convert_tokens_to_ids('<far>')} "):
        train(small(str(model), text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_resumed_with_other_threads_says_that_its_last_bits_may_differ(llama, text, tmp_path, capsys):
    config, threads = small(llama, text, tmp_path / "run", save_steps=2, init_from="magnitude"), torch.get_num_threads()
    train_until(config, 2)
    assert "order" not in capsys.readouterr().err
    torch.set_num_threads(threads + 1)
    try:
        train_until(config.changed(resume=True), 4)
    finally:
        torch.set_num_threads(threads)
    assert f"in another order (threads {threads} -> {threads + 1})" in capsys.readouterr().err


def test_kill_in_the_middle_of_a_save_leaves_the_last_whole_one(llama, text, tmp_path):
    """SIGKILL at random moments of a run that saves every step; it continues each time and ends as the straight run."""
    straight = small(llama, text, tmp_path / "straight", save_steps=1)
    train(straight)
    command = ["castlm", "train", "--config", str(tmp_path / "straight" / "config.yaml")]
    command += ["--output-dir", str(tmp_path / "killed")]
    log, checkpoints = tmp_path / "log", tmp_path / "killed" / "checkpoints"
    for saved in (2, 4):
        process = start_command(*command, log=log)
        assert wait_for(lambda n=saved: any(s >= n for s in checkpoint_steps(checkpoints)), [process]), log.read_text()
        process.kill()
        process.join()
        if saved == 2:
            command.append("--resume")
    assert wait_ranks([start_command(*command, log=log)], 60) == [0], log.read_text()
    assert_equal_weights(tmp_path / "straight" / "model", tmp_path / "killed" / "model")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_save_and_say_how_to_go_on(number, code, llama, text, tmp_path):
    out = tmp_path / "run"
    command = small_command("train", llama, text, out, max_steps=400, eval_steps=400, report_to="none")
    process = start_command("castlm", *command, log=tmp_path / "log")
    assert wait_for(lambda: num_rows(out) >= 5, [process]), (tmp_path / "log").read_text()
    os.kill(process.pid, number)
    assert wait_ranks([process], 60) == [code]
    assert f"castlm train --config {out / 'config.yaml'} --resume" in (tmp_path / "log").read_text()
    assert len(checkpoint_steps(out / "checkpoints")) == 1


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda run: run.model.model.norm.weight, "the loss is nan"),
        (lambda run: weight_parameter(next(iter(run.method.layers.values()))), "the weight .* contains NaN"),
    ],
)
def test_a_weight_that_became_nan_is_divergence_and_keeps_the_checkpoint(
    spoiled, message, llama, text, tmp_path, monkeypatch
):
    before_step(monkeypatch, 3, lambda run: spoiled(run).data.view(-1)[0].fill_(float("nan")))
    with pytest.raises(DivergedError, match=rf"step 4: {message}.*step-00000002"):
        train(small(llama, text, tmp_path / "run", save_steps=2, method="ste"))
    assert list(checkpoint_steps(tmp_path / "run" / "checkpoints")) == [2]
    assert not (tmp_path / "run" / "model").exists()


def test_a_last_step_that_overflows_is_divergence_and_writes_no_model(llama, text, tmp_path):
    with pytest.raises(DivergedError, match=r"not finite.*diverged"):
        train(small(llama, text, tmp_path / "run", max_steps=1, learning_rate=1e38, init_from="magnitude"))
    assert not (tmp_path / "run" / "model").exists()


def test_budget_stops_a_run_that_cannot_reach_zero(llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", decay="proportional", init_from="magnitude")
    with pytest.raises(InputError, match="horizon"):
        train(config)
    facts = train(config.changed(ignore_decay_budget=True, overwrite=True))
    assert facts.mask.largest_masked > 0.01


def test_a_resumed_run_tells_no_budget_of_the_dense_weights_that_it_has_before_its_checkpoint(
    llama, text, tmp_path, capsys
):
    config = small(llama, text, tmp_path / "run", start_effort="quick", max_steps=4, save_steps=2)
    train_until(config, 2)
    assert "masked weights of median 0, 99 % 0, largest 0" in capsys.readouterr().err
    train(config.changed(resume=True))
    assert "masked weights of" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["finetune", "srste", "cast"])
def test_an_evaluation_measures_twice_only_what_a_prune_would_change_and_changes_no_weight(
    method, llama, text, tmp_path, monkeypatch
):
    run = begin_run(small(llama, text, tmp_path / "run", method=method))
    take_steps(run)
    measured = []
    whole = run.perplexity
    monkeypatch.setattr(run, "perplexity", lambda: measured.append(whole()) or measured[-1])
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with run.recording():
        run.evaluate()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    figures = run.figures["1"]
    assert (figures["prune_now_ppl"] != figures["perplexity"]) == (method == "cast")
    with pruned(run.method.masks()):
        assert figures["prune_now_ppl"] == whole()
    assert len(measured) == (2 if method == "cast" else 1)


def test_a_run_that_rises_far_above_its_start_is_stopped(llama, text, tmp_path, monkeypatch):
    """In two evaluations in a row, before its last step; a checkpoint of the steps before stays."""
    perplexities = iter([10.0, 10.0, 15.1, 14.9, 15.1, 15.2])  # of the dense model, then of steps 0, 2, 4, 6 and 8
    monkeypatch.setattr(Trainer, "perplexity", lambda self: next(perplexities))
    config = small(llama, text, tmp_path / "run", max_steps=20, eval_steps=2, save_steps=6, method="finetune")
    with pytest.raises(DivergedError, match=r"step 8: .*15\.100 and 15\.200, .*start \(10\.000\).*step-00000006"):
        train(config)
    assert next(perplexities, None) is None


def test_a_general_text_is_measured_at_step_0_and_at_the_end(llama, text, tmp_path, capsys):
    general = tmp_path / "general.txt"
    general.write_text("Something else altogether. " * 40)
    facts = train(small(llama, text, tmp_path / "run", general_dataset=str(general)))
    names = [row.name for row in facts.general_figures]
    assert names == ["dense", "pruned one-shot by sparsegpt", "cast, pruned"]
    assert {row.text for row in facts.general_figures} == {str(general)}
    assert facts.general_figures[0].text_sha256 != facts.measured.text_sha256
    assert [row.perplexity for row in facts.general_figures] != [row.perplexity for row in facts.figures[:3]]
    assert f"on {general}: dense " in capsys.readouterr().err
    rows = [row for row in metrics(tmp_path / "run") if "general_ppl" in row]
    assert [row["step"] for row in rows] == [0, 8]
    assert rows[-1]["general_ppl"] == facts.general_figures[-1].perplexity


@pytest.mark.parametrize("initial", [slow("wanda"), "sparsegpt"])
def test_initial_mask_of_a_oneshot_method_is_where_the_run_starts(initial, llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", init_from=initial, calibration_sequences=4)
    run = begin_run(config)
    loaded = load_model(llama)
    ids = token_ids(run.text.documents, loaded.tokenizer, limit=16 * 4 * 32)
    sequences = draw_calibration(ids, 4, 32, seed=0)
    options = {"effort": "best"}
    if initial == "sparsegpt":
        options["refinements"] = part_of(config.start, Refinements)
    prune_oneshot_(loaded.model, initial, calibration=sequences, basis=part_of(config.start, BasisOptions), **options)
    masks = run.optimizer.masks()
    for name, layer in run.method.layers.items():
        pruned, weight = loaded.model.get_submodule(name).weight, weight_parameter(layer)
        assert torch.equal(masks[weight], pruned != 0), name
        assert torch.equal(weight[masks[weight]], pruned[pruned != 0]), name
        assert not weight[~masks[weight]].any(), name
    facts = train(config.changed(overwrite=True))
    assert 0 <= facts.mask.initial_flip_rate < 0.2  # some may come back for others
    assert facts.mask.largest_masked == 0
    assert facts.figures[1].name == f"pruned one-shot by {initial}"


@pytest.mark.parametrize("method", [slow("ste"), "srste", slow("ast")])
def test_rivals_start_from_the_same_weights(method, llama, text, tmp_path):
    """As the one-shot method leaves them, masked ones at zero; what is masked may come back."""
    cast = begin_run(small(llama, text, tmp_path / "cast"))
    config = small(llama, text, tmp_path / "rival", method=method, mask_interval=1, init_from="sparsegpt")
    rival = begin_run(config)
    assert rival.dense_perplexity == pytest.approx(cast.dense_perplexity)
    for (weight, mask), (theirs, their_mask) in zip(cast.method.masks().items(), rival.method.masks().items()):
        assert torch.equal(mask, their_mask)
        assert torch.equal(weight * mask, theirs)
    take_steps(rival, config.optimizer.max_steps)
    with rival.recording():
        rival.evaluate()
    assert rival.figures[str(config.optimizer.max_steps)]["initial_flip_rate"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"init_from \S+ and \S+ differ in the shape of"),
        ("llama", r"init_from \S+ is not 2:4 in model.layers.0.self_attn.q_proj"),
        ("wnada", "init_from wnada is neither one of magnitude, wanda, sparsegpt nor a model: "),
    ],
)
def test_another_model_a_dense_one_and_none_are_no_start(name, message, llama, text, tmp_path):
    start = str(save_tiny(tmp_path / name, name)) if name in FAMILIES else name
    with pytest.raises(InputError, match=message):
        train(small(llama, text, tmp_path / "run", init_from=start))


def test_a_model_that_sparsegpt_cannot_prune_is_told_what_can(llama, text, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise InputError("no calibration token reaches model.layers.0.mlp.experts.3.w1")

    monkeypatch.setattr(start, "run_start", refuse)
    with pytest.raises(InputError, match=r"init_from sparsegpt.*experts\.3\.w1.*init_from magnitude"):
        train(small(llama, text, tmp_path / "run", init_from=None))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--seq-len", "4096"], "seq_len 4096"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--device", "cuda"], "cuda"),
        (["--method", "gradual_magnitude", "--max-steps", "10", "--mask-interval", "10"], "mask_interval 10"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named, llama, text, tmp_path, capsys):
    if named == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_refused([([*small_command("train", llama, text, tmp_path / "out"), *arguments], named)], capsys)
    assert not (tmp_path / "out" / "model").exists()


def finished(llama, text, folder, **over) -> TrainConfig:
    """A run of two steps that is done."""
    config = small(llama, text, folder, max_steps=2, save_steps=1, **over)
    train(config)
    return config


def test_a_finished_run_is_resumed_as_itself_alone(llama, text, tmp_path):
    config = finished(llama, text, tmp_path / "run")
    assert train(config.changed(resume=True)) == Facts.read(tmp_path / "run" / "model")
    changes = ({"max_steps": 60}, {"learning_rate": 1e-2}, {"per_device_train_batch_size": 2}, {"save_dtype": "bf16"})
    for change in changes:  # save_dtype may differ as long as the result is not written
        with pytest.raises(InputError, match="not the run that was saved"):
            train(config.changed(resume=True, **change))
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is missing or has changed"):
        train(config.changed(resume=True))
    weights.unlink()
    with pytest.raises(InputError, match="is missing"):
        train(config.changed(resume=True))


def test_a_text_under_another_name_is_the_same_text(llama, text, tmp_path, monkeypatch):
    held_out = shutil.copy(text, tmp_path / "held_out.txt")
    fields = {"max_steps": 4, "save_steps": 2, "decay_end": 0.5}
    config = small(llama, text, tmp_path / "run", eval_dataset=str(held_out), **fields)
    train_until(config, 2)
    monkeypatch.chdir(tmp_path)
    other = {"dataset": os.path.relpath(text), "eval_dataset": "held_out.txt"}
    Path("held_out.txt").write_text(Path(text).read_text()[:-1])
    with pytest.raises(InputError, match=r"eval_sha256 \w+ -> \w+"):
        train(config.changed(resume=True, **other))
    shutil.copy(text, held_out)
    assert train(config.changed(resume=True, **other)).verdict.ok


def test_overwrite_keeps_the_old_result_until_the_new_one_is_whole(llama, text, tmp_path):
    config = finished(llama, text, tmp_path / "run")
    old = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    new = config.changed(overwrite=True, seed=1)

    def tree() -> list[str]:
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.name.startswith("."))

    before = tree()
    for bad in ({"model": "/nowhere"}, {"dataset": "/nowhere.txt"}, {"seq_len": 4096}, {"teacher_top_k": 10**6}):
        with pytest.raises(InputError):
            train(new.changed(**bad))
        assert tree() == before
    previous = tmp_path / "run.previous" / "model" / "model.safetensors"
    train_until(new, 1)
    assert previous.read_bytes() == old
    train_until(new.changed(seed=2), 1)  # an overwrite of what overwrote
    assert previous.read_bytes() == old
    train(new.changed(seed=2, overwrite=False, resume=True))
    assert record_of(tmp_path / "run" / "model")["config"]["seed"] == 2
    assert previous.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.previous", "run.unfinished"]


def test_the_config_of_an_overwritten_run_may_be_the_config_that_overwrites(llama, text, tmp_path):
    finished(llama, text, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    before = config.read_bytes()
    arguments = ["--config", str(config), "--output-dir", str(tmp_path / "run"), "--no-report"]
    assert main(["train", *arguments, "--overwrite"]) == 0
    assert (tmp_path / "run.previous" / "config.yaml").read_bytes() == before
    assert main(["train", *arguments, "--model", str(tmp_path / "run" / "model"), "--overwrite"]) == 2
    assert config.is_file()


def test_parts_of_a_checkpoint_that_was_being_removed_go_with_the_next_save(llama, text, tmp_path):
    fields = {"max_steps": 4, "save_steps": 2}
    config = small(llama, text, tmp_path / "run", **fields)
    train_until(config, 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000001").mkdir()
    (checkpoints / "step-00000001" / "shard-00000.safetensors").write_bytes(b"part")
    (checkpoints / "step-00000003").write_text("somebody's")
    train(config.changed(resume=True))
    assert not (checkpoints / "step-00000001").exists()
    assert (checkpoints / "step-00000003").read_text() == "somebody's"


def test_a_signal_while_the_folder_changes_waits_for_a_step_and_saves(llama, text, tmp_path, monkeypatch):
    config = finished(llama, text, tmp_path / "run")

    def stopped(*about, **more):
        begin_output(*about, **more)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "begin_output", stopped)
    with pytest.raises(Interrupted, match=r"stopped after step 1, .*castlm train --config \S+ --resume"):
        train(config.changed(overwrite=True))
    assert list(checkpoint_steps(tmp_path / "run" / "checkpoints")) == [1]


def test_sigterm_while_loading_ends_with_a_line(llama, text, tmp_path):
    command = ["castlm", "train", "--model", llama, "--dataset", text]
    command += ["--output-dir", str(tmp_path / "run"), "--seq-len", "32"]
    process = start_command(*command, log=tmp_path / "log")
    assert wait_for((tmp_path / "run" / LOCK).exists, [process]), (tmp_path / "log").read_text()
    os.kill(process.pid, signal.SIGTERM)
    (code,) = wait_ranks([process], 240)
    errors = (tmp_path / "log").read_text()
    assert code in (143, 0), errors  # 0: it has come to its first step by then, and has saved it
    assert "castlm: stopped" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("block", [ending_on_sigterm, Interrupt])
def test_sigterm_in_a_destructor_is_not_lost(block, capsys):
    class Destructor:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        with block():
            Destructor()
            time.sleep(10)

    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(SystemExit):
        work()
    assert "Traceback" not in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == (handler, hook)


@pytest.mark.parametrize(
    ("block", "number", "error"),
    [
        (ending_on_sigterm, signal.SIGINT, KeyboardInterrupt),
        (ending_on_sigterm, signal.SIGTERM, SystemExit),
        (Interrupt, signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_a_signal_that_a_library_turns_into_an_error_is_not_lost(block, number, error):
    def work() -> None:
        with block():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            except BaseException:
                raise ValueError("could not determine the shape") from None

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        work()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_subclass_of_cast_whose_row_does_not_decay_is_refused_first(llama, text, tmp_path, monkeypatch):
    """AdamS would decay nothing, and the prune would remove weights that are not zero."""
    row = METHODS["cast"]
    monkeypatch.setitem(METHODS, "mine", Method(row.module, row.class_name, "without its options"))
    with pytest.raises(InputError, match="'decay'"):
        train(small(llama, text, tmp_path / "run", method="mine"))
