"""castlm demo on a tiny model, stopped by a signal and resumed."""

import json
import os
import signal
from pathlib import Path

import pytest
from rich.table import Table

from castlm.cli import demo_payoff, demo_run
from castlm.cli.demo_payoff import Case, measure
from castlm.cli.main import main
from castlm.packed import generate
from castlm.training.trainer import Trainer
from tests.chats import save_chat_model
from tests.refusals import refused
from tests.runs import prune_to


@pytest.fixture
def tiny_demo(no_charts, tmp_path, monkeypatch) -> str:
    """The output folder of a demo whose model is tiny, and neither generates nor is timed."""
    monkeypatch.setattr(demo_run, "DEMO", save_chat_model(tmp_path / "model", max_position_embeddings=512))
    monkeypatch.setattr(demo_run, "payoff_table", lambda *_: (Table(), "a text", "a text"))
    monkeypatch.setattr(demo_run, "answer", lambda loaded: "a text")
    return str(tmp_path / "out")


def test_a_demo_that_was_stopped_says_how_to_go_on_and_does(tiny_demo, capsys, monkeypatch):
    steps, original = [], Trainer.train_step

    def step(self):
        steps.append((self.config.method.method, self.step))
        figures = original(self)
        if steps == [("cast", 0), ("cast", 1), ("dense", 0)]:
            os.kill(os.getpid(), signal.SIGINT)
        return figures

    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(["demo", "--output-dir", tiny_demo, "--max-steps", "2"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    again = f"castlm demo --output-dir {tiny_demo} --max-steps 2 --resume"
    assert said == f"castlm: stopped after step 1, saved; continue with: {again}"
    assert main(again.split()[1:]) == 0
    assert steps == [("cast", 0), ("cast", 1), ("dense", 0), ("dense", 1)]
    assert "verified 32:64 model" in capsys.readouterr().out


def test_the_ways_to_run_a_model_are_measured_on_the_cpu(monkeypatch, tmp_path):
    """On a GPU the packed model would be unpacked, and not be castlm's kernels."""

    def load(name, *, device="auto"):
        raise NotImplementedError(device)

    monkeypatch.setattr(generate, "load_to_generate", load)
    with pytest.raises(NotImplementedError, match="cpu"):
        measure(Case("packed", tmp_path), "a prompt")


def test_the_result_is_packed_in_its_own_pattern(llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_payoff, "in_own_process", lambda *_: demo_payoff.Measured(1.0, 1, "a text"))
    sparse = prune_to(tmp_path / "sparse", llama, pattern="16:32")
    demo_payoff.payoff_table(Path(llama), Path(sparse), tmp_path / "packed", "a prompt", print)
    assert '"pattern": "16:32"' in (tmp_path / "packed" / "castlm.json").read_text()


def test_a_folder_of_something_else_is_not_resumed(tiny_demo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "no output of castlm demo" in refused(["demo", "--output-dir", tiny_demo, "--resume"], capsys)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_no_question_of_the_held_out_conversations_is_trained_on(tmp_path):
    questions = [
        {json.loads(line)["messages"][0]["content"] for line in path.read_text(encoding="utf-8").splitlines()}
        for path in demo_run.write_texts(tmp_path)
    ]
    assert not questions[0] & questions[1]
    assert all(questions)
