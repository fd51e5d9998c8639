"""The work of `castlm demo`: trains a chat model that comes with pip on conversations that it wrote itself.

SmolLM2-135M-Instruct is made 32:64, the pattern for CPUs, on its own answers to everyday questions; one in eight is
held out for evaluation. The dense control gets the same training, because continued training alone helps on a narrow
text. 2:4, the pattern of GPUs, is shown after the start alone.

`castlm sample demo --chat --prompts QUESTIONS --num-tokens 16000 --max-new-tokens 160 --temperature 0.7 --top-p 0.95
--batch-size 48` wrote `demo_chats.jsonl`; the questions are the user's turns in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from rich.table import Table

from castlm.api.evaluate import evaluate
from castlm.api.prune import prune
from castlm.cli.demo_payoff import NEW_TOKENS, payoff_table
from castlm.core.sparsify import prune_
from castlm.evaluation.answers import Answer, nats_per_token, repetition
from castlm.facts import Facts
from castlm.files.output import begin_output, output_folder
from castlm.models.io import Loaded, load_model
from castlm.models.locate import DEMO
from castlm.packed.generate import encode_prompt, generate_text
from castlm.progress import Screen, note
from castlm.training.config import TrainConfig
from castlm.training.train import train

HELD_OUT = 8  # one name in 8
PROMPT = "Why do people like music?"
PATTERN, GPU_PATTERN = "32:64", "2:4"


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the conversations for training and for evaluation as .jsonl; answers to one question stay together."""
    rows = files("castlm.cli").joinpath("demo_chats.jsonl").read_text(encoding="utf-8").splitlines()
    return write_split(folder, ((json.loads(row)["messages"][0]["content"], row) for row in rows))


def write_split(folder: Path, rows: Iterable[tuple[str, str]]) -> tuple[Path, Path]:
    """Writes train.jsonl and held_out.jsonl to `folder`.

    Args:
        rows: each line with its name, whose hash decides whether it is held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_file, eval_file = folder / "train.jsonl", folder / "held_out.jsonl"
    with train_file.open("w", encoding="utf-8") as train_out, eval_file.open("w", encoding="utf-8") as eval_out:
        for name, row in rows:
            held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
            (eval_out if held_out else train_out).write(row + "\n")
    return train_file, eval_file


def demo_config(folder: Path, max_steps: int, method: str) -> TrainConfig:
    texts = folder / "text"
    start = {"start_effort": "quick", "pattern": PATTERN} if method == "castlm" else {}
    return TrainConfig.of(
        model=DEMO,
        dataset=str(texts / "train.jsonl"),
        eval_dataset=str(texts / "held_out.jsonl"),
        output_dir=str(folder / method),
        method="cast" if method == "castlm" else "dense",
        max_steps=max_steps,
        seq_len=512,
        per_device_train_batch_size=1,
        eval_tokens=2048,
        eval_steps=max_steps,
        save_steps=0,
        resume=True,
        **start,
    )


def run_demo(folder: Path, max_steps: int, overwrite: bool, resume: bool) -> None:
    """Trains with castlm and the dense control; prints their perplexities, costs of inference and texts."""
    with output_folder(folder, "demo", overwrite=overwrite, resume=resume) as claimed:
        begin_output(claimed, "demo", resume=resume)
        _run_demo(claimed, max_steps)


def _run_demo(folder: Path, max_steps: int) -> None:
    """Runs both trainings and prints the tables."""
    started = time.monotonic()
    console = Screen(highlight=False, soft_wrap=True)
    write_texts(folder / "text")
    facts: dict[str, Facts] = {}
    for number, method in enumerate(("castlm", "dense"), 1):
        what = f"dense to {PATTERN}" if method == "castlm" else "the dense control, with the same training"
        console.print(f"[{number}/3] {what}: {max_steps} steps of 512 tokens", markup=False)
        facts[method] = train(demo_config(folder, max_steps, method))
    console.print(f"[3/3] dense to {GPU_PATTERN}, the start alone, for comparison", markup=False)
    of_gpus = one_shot_perplexity(folder, GPU_PATTERN)
    console.print(results_table(facts["castlm"], facts["dense"], of_gpus))
    result, packed = folder / "castlm" / "model", folder / "packed"
    table, of_control, of_packed = payoff_table(folder / "dense" / "model", result, packed, PROMPT, note)
    console.print(f"\n{PROMPT!r}, answered by", markup=False)
    for line in answer_lines({"control": of_control, f"castlm {PATTERN}": of_packed}):
        console.print(line, markup=False)
    console.print(table)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nverified {PATTERN} model, in {minutes:.1f} minutes: {result}", markup=False)
    console.print(f"count the groups yourself:  castlm verify {shlex.quote(str(result))}", markup=False)
    generate = f"castlm generate {shlex.quote(str(packed))} --prompt 'Why is sleep important?'"
    console.print(f"ask the packed model:       {generate}", markup=False)
    console.print(
        f"train on your own text:     castlm train --model {DEMO} --dataset FILE --output-dir RUN", markup=False
    )


def one_shot_perplexity(folder: Path, pattern: str) -> float:
    """Prunes the model as at the start of the training, and returns its perplexity on the held-out answers."""
    texts, pruned = folder / "text", folder / f"one-shot-{pattern.replace(':', 'of')}"
    if not pruned.is_dir():  # else of the demo that is resumed
        text = str(texts / "train.jsonl")
        prune(DEMO, text, pattern=pattern, output_dir=pruned, start_effort="quick", seq_len=512)
    held_out = str(texts / "held_out.jsonl")
    perplexity = evaluate(pruned, held_out, seq_len=512, eval_tokens=2048, precision="auto").perplexity
    assert perplexity is not None
    return perplexity


def results_table(sparse: Facts, control: Facts, of_gpus: float) -> Table:
    """A table of the perplexities and their log distance to the dense model.

    Args:
        of_gpus: the perplexity of the pattern of GPUs after the start.
    """
    ppl, measured = sparse.perplexity, sparse.measured
    assert ppl.dense is not None
    assert ppl.one_shot is not None
    assert measured is not None
    table = Table(
        title=f"perplexity on {measured.num_tokens:,} tokens of held-out answers, context {measured.seq_len}",
        title_justify="left",
    )
    for heading in ("model", "perplexity", "ln(ppl/dense)", "of one-shot gap"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    one_shot = math.log(ppl.one_shot / ppl.dense)
    for name, value in (
        ("dense", ppl.dense),
        ("dense control, same training", control.perplexity.trained),
        (f"{GPU_PATTERN} one-shot, a start for GPUs", of_gpus),
        (f"{PATTERN} one-shot, the start", ppl.one_shot),
        (f"{PATTERN} castlm, before the prune", ppl.before_prune),
        (f"{PATTERN} castlm, pruned", ppl.pruned),
    ):
        assert value is not None, name
        distance = math.log(value / ppl.dense)
        table.add_row(name, f"{value:,.2f}", f"{distance:+.3f}", f"{distance / one_shot:.0%}")
    return table


def answer_lines(trained: dict[str, str]) -> list[str]:
    """The answers of the dense model, of its one-shot prune by magnitude and of the `trained` ones, each measured.

    A line has the share of 4-grams that repeat an earlier one, and the dense model's nats per token of the answer.
    """
    dense, pruned = load_model(DEMO), load_model(DEMO)
    prune_(pruned.model)
    prompt = encode_prompt(dense.tokenizer, PROMPT, raw=False)
    lines = []
    for name, text in {"dense": answer(dense), "magnitude": answer(pruned), **trained}.items():
        ids = list(dense.tokenizer(text, add_special_tokens=False)["input_ids"])
        nats = f"{nats_per_token(dense.model, [Answer(prompt, text, ids)]):.2f}" if ids else "none"
        lines += [
            f"  {name} ({repetition(ids):.0%} repeated, {nats} nats a token under the dense model):",
            f"    {text}",
        ]
    return lines


def answer(loaded: Loaded) -> str:
    ids = encode_prompt(loaded.tokenizer, PROMPT, raw=False)
    done = generate_text(loaded.model, loaded.tokenizer, ids, max_new_tokens=NEW_TOKENS)
    return " ".join(done.text.split())
