"""Every code block of guides, tutorial and README is run as it is printed, or carries a mark that says why not.

The blocks of a page run in their order, in one folder, as a reader would type them. `READ_AS` holds the words that
stand for something of the reader's, `SMALLER` the options that make a command small; nothing else is changed. A block
that cannot run here has the line `<!-- not run: REASON -->` above it, which the site does not show.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import castlm
from castlm.cli.main import main
from castlm.lab.advice import cpu
from tests.chats import save_chat_model, talks, write_talks
from tests.ranks import free_port, start_command, wait_ranks
from tests.slow import slow_but
from tests.test_compare import run_here
from tests.test_zeroshot import ROWS as TASKS
from tests.texts import write_rows, write_texts
from tests.tiny import TEXT, save_tiny, save_tiny_with_images, sparse_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    page.name: page.read_text()
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs" / name for name in ("install.md", "tutorial.md", "formats.md")),
        *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    )
}
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)

NOT_RUN = {
    "installs castlm": 2,
    "installs vLLM": 1,
    "needs a GPU": 4,
    "needs a model of 3B": 1,
    "needs several GPUs": 1,
    "needs several machines": 1,
    "needs slurm": 1,
    "needs a server": 1,
    "takes hours": 1,
    "trains for minutes": 1,
    "needs llama.cpp": 1,
    "needs a GGUF file": 1,
    "needs TensorRT": 1,
    "reads the hub": 1,
}
"""The reasons of the blocks that are not run, and how many blocks have each."""

RUN_ELSEWHERE = {"extend.md": "tests/test_examples.py"}

READ_AS: dict[str, str] = {
    **dict.fromkeys(("demo", "MODEL", "DENSE", "HuggingFaceTB/SmolLM2-135M"), "dense"),  # a tiny LLaMA that chats
    "Qwen/Qwen3-30B-A3B": "experts",  # a tiny Mixtral
    "llava-hf/llava-1.5-7b-hf": "vision",  # a tiny LLaVA
    "path/to/model": "run",
    "FOLDER": "tasks",
}
"""The words of commands and of Python that are read as others."""

BATCH = "--seq-len 64 --per-device-train-batch-size 4 --eval-tokens 128"
RUN = f"{BATCH} --max-steps 8 --learning-rate 1e-3 --save-steps 0 --report-to none"
START = "--calibration-sequences 4"
ONE_SHOT = "--calibration-sequences 4 --seq-len 64"
SMALLER = [
    ("train", "", f"{RUN} {START} --no-report"),
    ("finetune", "", f"{RUN} --no-report"),
    ("prune", "--calibration", ONE_SHOT),
    ("quantize", "--calibration", ONE_SHOT),
    ("quantize", "--train-steps", "--train-steps 2"),
    ("eval", "--text", "--seq-len 64"),
    ("generate", "", "--max-new-tokens 4"),
    ("sample", "", "--num-tokens 400 --max-new-tokens 32 --batch-size 4"),
    ("compare", "", f"{ONE_SHOT} --eval-tokens 128 --seeds 1"),
    ("compare", "--max-steps", "--max-steps 2 --methods cast,wanda --config small.yaml"),
    ("compare", "--budget-tokens", "--budget-tokens 1024"),
    ("plan predict", "--tokens", "--tokens 8192"),
    ("plan check", "", f"{RUN} {START}"),
]
"""Options that follow those of a command that has a word, where the last one counts."""

BEFORE = {
    "cpu.md": ["castlm train --model MODEL --dataset text.txt --output-dir my-run"],
    "deploy.md": ["castlm train --model MODEL --dataset text.txt --output-dir run"],
    "fell-short.md": ["castlm train --model MODEL --dataset text.txt --output-dir run"],
    "report.md": ["castlm train --model MODEL --dataset text.txt --output-dir run"],
}
"""Commands that come before those of a page, which begins with a result of the reader's."""


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
"""Sizes of which a SHiRA adapter of rank 16 fits."""


class Block(NamedTuple):
    why: str | None
    """Why it is not run; None where it is."""
    language: str
    code: str


def blocks_of(page: str) -> list[Block]:
    return [Block(*match.group("why", "language", "code")) for match in BLOCK.finditer(PAGES[page])]


def test_every_block_that_is_not_run_says_why():
    found = {page: blocks_of(page) for page in PAGES}
    for page, blocks in found.items():
        assert PAGES[page].count("\n```") == 2 * len(blocks), f"{page}: a block that the test does not see"
    assert Counter(block.why for blocks in found.values() for block in blocks if block.why) == NOT_RUN


def commands_of(block: Block) -> list[str]:
    return block.code.replace("\\\n", " ").splitlines() if block.language in ("", "bash", "sh") else []


def test_a_guide_begins_with_a_command_for_minutes():
    others = {"README.md", "tutorial.md", "experts.md", "vision.md"}  # there is no small model of the last two kinds
    for page in PAGES.keys() - others:
        commands = [line for block in blocks_of(page) for line in commands_of(block)]
        first = shlex.split(commands[0], comments=True) if commands else []
        steps = int(first[first.index("--max-steps") + 1]) if "--max-steps" in first else 0
        assert 0 < steps <= 10 or not {"train", "compare"} & {*first}, page
        assert "MODEL" not in first, page


def names_of(page: str) -> dict[str, Any]:
    """The names that a reader of the Python of a page has, new for each block."""
    match page:
        case "own-loop.md":
            return {"model": tiny_model("llama"), "token_ids": torch.randint(256, (8, 32)), "folder": "looped"}
        case "experts.md":
            return {"castlm": castlm, "model": tiny_model("mixtral")}
        case "vision.md":
            return {"castlm": castlm, "model": tiny_model("llava")}
        case "finetune.md":
            peft, trl = (pytest.importorskip(name) for name in ("peft", "trl"))
            ids = torch.randint(256, (8, 16))
            return {
                "castlm": castlm,
                "peft": peft,
                "torch": torch,
                "Trainer": Trainer,
                "SFTTrainer": partial(trl.SFTTrainer, processing_class=tiny_tokenizer()),
                "SFTConfig": partial(trl.SFTConfig, max_steps=2, max_length=32, report_to=[]),
                "args": TrainingArguments("trained", max_steps=2, use_cpu=True, report_to=[]),
                "data": Dataset.from_dict({"input_ids": ids, "labels": ids}),
                "model": sparse_model(**WIDE),
            }
        case _:
            return {}


class Reader:
    """Types the commands of a page in the working folder, which `texts_of` has filled."""

    def __init__(self) -> None:
        self.port = free_port()
        self.server: BaseProcess | None = None

    def types(self, line: str) -> None:
        words = [READ_AS.get(word, word) for word in shlex.split(line, comments=True)]
        words = [str(ROOT / word) if word.startswith("configs/models/") else word for word in words]
        if not words:
            return
        program, *arguments = words
        if program == "torchrun":
            arguments[arguments.index("--nproc-per-node") + 1] = "2"
            command = [sys.executable, "-m", "torch.distributed.run", *arguments, *shlex.split(f"{RUN} {START}")]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
            assert done.returncode == 0, done.stdout
            return
        assert Path(program).name == "castlm", line
        name = " ".join(arguments[: 1 + (arguments[0] == "plan")])
        printed = [*arguments, ""]
        for command, word, options in SMALLER:
            arguments += shlex.split(options) if command == name and word in printed else []
        if name == "serve":
            self.serves(arguments)
        else:
            assert main(arguments) == 0, line

    def serves(self, arguments: list[str]) -> None:
        """Starts the server and waits until it answers."""
        log = Path("server.log")
        self.server = start_command("castlm", *arguments, "--port", str(self.port), "--threads", "1", log=log)
        for _ in range(600):
            assert self.server.is_alive(), log.read_text()
            with contextlib.suppress(httpx.ConnectError):
                httpx.get(f"http://localhost:{self.port}/health")
                return
            time.sleep(0.1)

    def writes(self, page: str, code: str) -> None:
        """Runs a block of Python."""
        for printed, read in READ_AS.items():
            code = code.replace(f'"{printed}"', f'"{read}"')
        for printed, read in {"localhost:8000": f"localhost:{self.port}", "seq_len=128": "seq_len=32"}.items():
            code = code.replace(printed, read)
        exec(compile(code, page, "exec"), names_of(page))

    def leaves(self) -> None:
        if self.server:
            os.kill(self.server.pid, signal.SIGINT)
            wait_ranks([self.server], 30)


def texts_of(page: str) -> None:
    """Writes the models and texts that a page names into the working folder."""
    save_chat_model(Path("dense"), **WIDE, max_position_embeddings=1024)
    for name in ("text", "held_out", "train", "tuning"):
        Path(f"{name}.txt").write_text(f"{name}\n\n{TEXT}")
    write_texts(Path("text.jsonl"), TEXT.split("\n\n"))
    write_texts(Path("my-text.jsonl"), TEXT.split("\n\n"))
    for name in ("chat", "held_out"):
        write_talks(Path(f"{name}.jsonl"), talks(40))
    Path("prompts.txt").write_text("Story 1\nStory 2\n")
    match page:
        case "experts.md":
            save_tiny("experts", "mixtral")
        case "compare.md":
            Path("small.yaml").write_text("calibration_sequences: 4\n")
        case "multi-gpu.md":
            Path("run.yaml").write_text("model: dense\ndataset: text.txt\noutput_dir: run\n")
        case "tutorial.md":
            Path("tasks").mkdir()
            for name, rows in TASKS.items():
                write_rows(Path("tasks") / name, rows)
        case "vision.md":
            from PIL import Image

            save_tiny_with_images("vision")
            Path("cats").mkdir()
            for image in ("cats/1.png", "cat.png"):
                Image.new("RGB", (32, 32), "gray").save(image)
            (row,) = (json.loads(block.code) for block in blocks_of(page) if block.language == "json")
            for name in ("images", "held_out"):
                write_rows(Path(f"{name}.jsonl"), [row] * 16)


QUICK = ("README.md", "own-loop.md", "deploy.md", "how-long.md", "extend.md", "prune.md")


@pytest.mark.parametrize("page", slow_but(QUICK, PAGES))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, no_charts):
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch)
    for name, value in {"_COLD_BYTES": 1 << 16, "SECONDS": 0.0}.items():  # of advise, which times formats for a minute
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(cpu.rank, "__kwdefaults__", cpu.rank.__kwdefaults__ | {"seconds": 0.0})
    texts_of(page)
    reader = Reader()
    for command in BEFORE.get(page, []):
        reader.types(command)
    try:
        for block in blocks_of(page):
            if block.why or page in RUN_ELSEWHERE:
                continue
            if block.language == "python":
                reader.writes(page, block.code)
            for line in commands_of(block):  # a block of JSON is the dataset of its page
                reader.types(line)
    finally:
        reader.leaves()
