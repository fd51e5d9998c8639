"""`castlm demo`: trains a real model that comes with pip on text that comes with Python.

SmolLM2-135M-Instruct is made 2:4 on the Python language reference; whole topics are held out for evaluation. The dense
control gets the same training, because continued training alone helps on a narrow text.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.table import Table

from castlm.cli.demo_payoff import payoff_table
from castlm.cli.options import command_line, parse
from castlm.core.sparsify import prune_
from castlm.files.output import begin_output, output_folder
from castlm.hardware import keep_freed_memory
from castlm.models.io import Loaded, load_model
from castlm.models.locate import DEMO
from castlm.progress import Screen, note
from castlm.signals import Interrupted
from castlm.training.config import TrainConfig
from castlm.training.train import train

HELD_OUT = 8  # one topic in 8
PROMPT = "The for statement is used to"
NEW_TOKENS = 40


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the language reference as .jsonl, one topic per document; the hash of a topic's name decides whether it is
    held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_file, eval_file = folder / "train.jsonl", folder / "held_out.jsonl"
    with train_file.open("w", encoding="utf-8") as train_out, eval_file.open("w", encoding="utf-8") as eval_out:
        for name in sorted(topics):
            held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
            (eval_out if held_out else train_out).write(json.dumps({"text": topics[name]}) + "\n")
    return train_file, eval_file


def demo_config(folder: Path, max_steps: int, method: str) -> TrainConfig:
    texts = folder / "text"
    start = {"start_effort": "quick"} if method == "castlm" else {}
    return TrainConfig.of(
        model=DEMO,
        dataset=str(texts / "train.jsonl"),
        eval_dataset=str(texts / "held_out.jsonl"),
        output_dir=str(folder / method),
        method="cast" if method == "castlm" else "dense",
        max_steps=max_steps,
        seq_len=128,
        per_device_train_batch_size=4,
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
    records: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(("castlm", "dense"), 1):
        what = "dense to 2:4" if method == "castlm" else "the dense control, with the same training"
        console.print(f"[{number}/2] {what}: {max_steps} steps of 512 tokens", markup=False)
        records[method] = train(demo_config(folder, max_steps, method))
    console.print(results_table(records["castlm"], records["dense"]))
    completions(console, folder)
    result, packed = folder / "castlm" / "model", folder / "packed"
    table, text = payoff_table(folder / "dense" / "model", result, packed, PROMPT, note)
    console.print(table)
    console.print(f"{PROMPT!r}, continued by the packed model: {text}", markup=False)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nverified 2:4 model, in {minutes:.1f} minutes: {result}", markup=False)
    console.print(f"count the groups yourself:  castlm verify {shlex.quote(str(result))}", markup=False)
    generate = f"castlm generate {shlex.quote(str(packed))} --raw --prompt 'A list in Python is'"
    console.print(f"let the packed model write: {generate}", markup=False)  # it saw no chat in so few steps
    console.print(
        f"train on your own text:     castlm train --model {DEMO} --dataset FILE --output-dir RUN", markup=False
    )


def results_table(sparse: dict[str, Any], control: dict[str, Any]) -> Table:
    """A table of the perplexities and their log distance to the dense model."""
    ppl = sparse["perplexity"]
    measured = sparse["measured"]
    table = Table(
        title=f"perplexity on {measured['num_tokens']:,} held-out tokens of the Python language reference, "
        f"context {measured['seq_len']}",
        title_justify="left",
    )
    for heading in ("model", "perplexity", "ln(ppl/dense)", "of one-shot gap"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    one_shot = math.log(ppl["one_shot"] / ppl["dense"])
    for name, value in (
        ("dense", ppl["dense"]),
        ("dense control, same training", control["perplexity"]["trained"]),
        ("2:4 one-shot, the start", ppl["one_shot"]),
        ("2:4 castlm, before the prune", ppl["before_prune"]),
        ("2:4 castlm, pruned", ppl["pruned"]),
    ):
        distance = math.log(value / ppl["dense"])
        table.add_row(name, f"{value:,.2f}", f"{distance:+.3f}", f"{distance / one_shot:.0%}")
    return table


def completions(console: Screen, folder: Path) -> None:
    """The same prompt, continued greedily by each of the models."""
    console.print(f"\n{PROMPT!r}, continued by", markup=False)
    one_shot = load_model(DEMO)
    console.print(f"  dense:       {complete(one_shot)}", markup=False)
    prune_(one_shot.model)
    console.print(f"  magnitude:   {complete(one_shot)}", markup=False)
    for name, method in (("control", "dense"), ("castlm 2:4", "castlm")):
        console.print(f"  {name + ':':12} {complete(load_model(folder / method / 'model'))}", markup=False)


@torch.no_grad()
def complete(loaded: Loaded) -> str:
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    ids = loaded.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.1)
    return " ".join(str(loaded.tokenizer.decode(ids[0], skip_special_tokens=True)).split())


@dataclass
class DemoCommand:
    """Train the bundled SmolLM2-135M-Instruct to a verified 2:4 model, and compare it with the dense one."""

    output_dir: str = "demo-output"
    """Folder for the runs and the result."""

    max_steps: int = 25
    """Optimizer steps of 512 tokens, each for castlm and for the dense control."""

    resume: bool = False
    """Continue an interrupted start; without one, start."""

    overwrite: bool = False
    """Start again; the earlier output becomes OUTPUT_DIR.previous."""

    def run(self) -> int:
        keep_freed_memory()
        try:
            run_demo(Path(self.output_dir), self.max_steps, self.overwrite, self.resume)
        except Interrupted as stop:
            again = replace(self, resume=True, overwrite=False)
            note(f"{stop.reason}; continue with: {command_line('demo', again)}")
            return stop.exit_code
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(DemoCommand, arguments, "demo").run())
