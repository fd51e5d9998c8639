"""Writes tests/golden, which tests/test_golden.py reads: `python -m tests.make_golden` (two minutes of one core).

Write it again only where a format changes on purpose, or where a default gets better, and say so in the commit: until
then the files stand for what users have on their disks.

    model/            a dense LLaMA of 66,000 weights and a token for each byte, trained on train.txt
    train.txt, held_out.txt    conversations of the demo, as plain text
    packed/NAME/      the model pruned by magnitude and packed: one folder for each row of FORMATS
    logits.safetensors         the logits of each packed folder for the first tokens of held_out.txt
    run/              a run that Ctrl-C stopped, with its checkpoint
    castlm.json       of a finished run
    expected.json     perplexities on held_out.txt: of the dense model, of the default start, and after training
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from castlm import register
from castlm.cli.main import main
from castlm.facts import Facts
from tests.ranks import start_command, wait_ranks
from tests.tiny import tiny_model, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CHATS = Path(__file__).parents[1] / "src" / "castlm" / "cli" / "demo_chats.jsonl"
FORMATS = {
    "dense-bf16": ("1:1", []),
    "dense-int8": ("1:1", ["--kind", "int8", "--head", "int8"]),
    "dense-int4": ("1:1", ["--kind", "int4"]),
    "2of4-bf16": ("2:4", []),
    "2of4-fp32": ("2:4", ["--dtype", "fp32"]),
    "2of4-int8": ("2:4", ["--kind", "int8"]),
    "8of16-int4": ("8:16", ["--kind", "int4", "--head", "int8"]),
    "32of64-int3": ("32:64", ["--kind", "int3", "--head", "int8", "--calibration", "train.txt", "--seq-len", "64"]),
}
"""The pattern of a packed folder ("1:1": dense), and options of `castlm pack` or, with a kind, of `castlm quantize`."""

TRAIN = [
    *("--model", "model", "--dataset", "train.txt", "--eval-dataset", "held_out.txt", "--eval-tokens", "0"),
    *("--seq-len", "64", "--per-device-train-batch-size", "8", "--learning-rate", "3e-3", "--report-to", "none"),
    "--no-report",
]
"""A run with the defaults but for its sizes, its learning rate and the page."""
QUALITY = [*TRAIN, "--max-steps", "60", "--eval-steps", "100000", "--save-steps", "0"]


def castlm(*arguments: str | Path) -> None:
    """Runs a command of castlm."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


def write_texts() -> None:
    """Writes both texts, one conversation in eight held out."""
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, line in enumerate(CHATS.read_text(encoding="utf-8").splitlines()):
        turns = [message["content"] for message in json.loads(line)["messages"]]
        texts["train" if number % 8 else "held_out"].append("\n".join(turns))
    for name, parts in texts.items():
        Path(f"{name}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def train_dense() -> None:
    """Trains the dense model from random weights."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=16, tie_word_embeddings=True).train()
    ids = tokenizer(Path("train.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    steps = 1200
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 64, (16,)).tolist()
        batch = torch.stack([ids[start : start + 64] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().bfloat16().save_pretrained("model")
    tokenizer.save_pretrained("model")


def first_ids(number: int) -> torch.Tensor:
    """The first tokens of the held-out text, (1, number)."""
    text = (GOLDEN / "held_out.txt").read_text(encoding="utf-8")
    return torch.tensor([tiny_tokenizer()(text).input_ids[:number]])


def logits_of(folder: Path) -> torch.Tensor:
    """The logits of a packed folder for 16 tokens, (16, 264) in fp32."""
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(first_ids(16)).logits[0].float()


def pack(work: Path) -> None:
    """Writes the packed folder of each format, and their logits."""
    for name, (pattern, options) in FORMATS.items():
        source, packed = Path("model"), Path("packed") / name
        if pattern != "1:1":
            source = work / pattern
            if not source.exists():
                castlm(
                    "prune", "--model", "model", "--solver", "magnitude", "--pattern", pattern, "--output-dir", source
                )
        if "--kind" in options:
            castlm("quantize", source, "--packed", *options, "--output-dir", packed)
        else:
            castlm("pack", source, *options, "--output-dir", packed)
        for extra in ("README.md", "castlm-output.json"):
            (packed / extra).unlink(missing_ok=True)
        if pattern != "1:1":
            castlm("verify", packed)
    save_file({name: logits_of(Path("packed") / name) for name in FORMATS}, "logits.safetensors")


def stop_a_run(work: Path) -> None:
    """Leaves a run that Ctrl-C stopped after a few steps, with its checkpoint."""
    options = ["--max-steps", "12", "--eval-steps", "100000", "--save-steps", "0", "--output-dir", "run"]
    process = start_command("castlm", "train", *TRAIN, *options, log=work / "log")
    metrics = Path("run/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 4):
        assert process.is_alive(), (work / "log").read_text()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    wait_ranks([process], 60)
    assert list(Path("run/checkpoints").iterdir())


def quality(folder: Path) -> dict[str, Any]:
    """Trains with the defaults and returns the perplexities of dense model, start and result."""
    castlm("train", *QUALITY, "--output-dir", folder)
    facts = Facts.from_json(json.loads((folder / "model" / "castlm.json").read_text()), "castlm.json")
    start = next(
        row["perplexity"]
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "perplexity" in row
    )
    return {"dense": facts.perplexity.dense, "start": start, "trained": facts.perplexity.final}


def write_golden() -> None:
    """Writes the folder anew."""
    torch.set_num_threads(1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    os.chdir(GOLDEN)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_texts()
        train_dense()
        pack(work)
        stop_a_run(work)
        expected = quality(work / "quality")
        Path("expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
        shutil.copy(work / "quality" / "model" / "castlm.json", "castlm.json")
        for record in GOLDEN.rglob("*.json"):  # no paths of the machine that wrote them
            text = record.read_text(encoding="utf-8")
            record.write_text(text.replace(f"{work}/", "").replace(f"{GOLDEN}/", ""), encoding="utf-8")


if __name__ == "__main__":
    write_golden()
