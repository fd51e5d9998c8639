"""castlm plan sweep: its runs, its files, and a sweep after a kill. All but one test draw their runs."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml

from castlm.cli.main import main
from castlm.files.record import record_output
from castlm.lab.compare import runs
from castlm.lab.planning import fit
from castlm.lab.planning.law import Law
from castlm.training.config import TrainConfig
from castlm.training.train import train
from castlm.training.trainer import Trainer
from tests.refusals import assert_refused
from tests.runs import Killed, before_each_step, killed_in
from tests.tiny import TEXT

STEP = 64  # tokens
LARGEST = 64 * 64 * STEP


@pytest.fixture(scope="module")
def files(llama, text, tmp_path_factory) -> list[str]:
    held_out = tmp_path_factory.mktemp("files") / "eval.txt"
    held_out.write_text(TEXT[:2000])
    named = ["--model", llama, "--dataset", text, "--eval-dataset", str(held_out)]
    return [*named, "--seq-len", "32", "--per-device-train-batch-size", "2", "--eval-tokens", "256"]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """The intervals of a law take a tenth of their time; `plan fit` has as many draws as users in test_plan_command."""
    fitted = fit._fit
    monkeypatch.setattr(fit, "_fit", lambda data, num_draws, seed: fitted(data, 20, seed))


@pytest.fixture
def sweep(files, tmp_path):
    """Runs the command in a folder; gives its exit code."""

    def run(*more: str, folder: str = "out") -> int:
        budgets = [] if "--tokens" in more else ["--largest-tokens", str(LARGEST)]
        return main(["plan", "sweep", *files, "--output-dir", str(tmp_path / folder), *budgets, *more])

    return run


class Drawn:
    """Stands for the processes of runs: writes results that follow a law, and keeps the runs it was asked for."""

    def __init__(self) -> None:
        self.sign = 1
        self.done: list[tuple[int, int]] = []
        self.kill_at = self.fail_at = self.verdict = None
        self.failure = 2, "the disk is full"  # exit code and last line

    def __call__(self, arguments, log) -> int:
        config = yaml.safe_load(Path(arguments[-1]).read_text())
        assert config["method"] == "cast"
        if len(self.done) == self.kill_at:
            raise Killed
        if len(self.done) == self.fail_at:
            code, said = self.failure
            log.write_text(f"castlm: error: {said}\n")
            return code
        tokens, seed = config["max_steps"] * STEP, config["seed"]
        self.done.append((config["max_steps"], seed))
        folder = Path(config["output_dir"]) / "model"
        folder.mkdir(parents=True)
        record = {
            "schema_version": 1,
            "method": "cast",
            "config": {"seed": seed},
            "train_tokens": tokens,
            "num_params": 1000,
        }
        record["perplexity"] = {"pruned": self.perplexity(tokens, seed)}
        record |= {} if self.verdict is None else {"verdict": self.verdict}
        (folder / "castlm.json").write_text(json.dumps(record))
        record_output(folder, command="result", checksums=True)
        (folder.parent / "castlm-output.json").write_text('{"command": "train"}')
        return 0

    def perplexity(self, tokens: int, seed: int) -> float:
        noise = 1e-4 * random.Random(tokens + seed).gauss(0, 1)
        return math.exp((1.5 + self.sign * 20 * tokens**-0.4) * math.exp(noise))


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    stand_in = Drawn()
    monkeypatch.setattr(runs, "run_process", stand_in)
    return stand_in


BUDGETS = [64, 147, 337, 776, 1782, 4096]  # steps
ALL = [(steps, seed) for steps in BUDGETS for seed in (0, 1)]


def test_all_budgets_are_run_from_the_cheapest_on_and_their_law_is_written(sweep, drawn, tmp_path, capsys):
    assert sweep() == 0
    assert drawn.done == ALL
    law = Law.from_dict(json.loads((tmp_path / "out" / "law.json").read_text()))
    assert (law.num_points, law.num_budgets) == (12, 6)
    assert law.holdout.perplexity == pytest.approx(drawn.perplexity(LARGEST, 0), rel=1e-3)
    assert law.holdout.low < law.holdout.perplexity < law.holdout.high
    out = capsys.readouterr().out
    assert f"{64 * STEP:,} tokens: perplexity" in out
    assert f"{law.holdout.low:.4f} to {law.holdout.high:.4f}" in out
    assert main(["plan", "predict", str(tmp_path / "out" / "law.json"), "--tokens", "1e6"]) == 0


@pytest.mark.parametrize("at", [0, 1, 9])
def test_a_killed_sweep_continues(at, sweep, drawn, tmp_path):
    sweep(folder="straight")
    drawn.done, drawn.kill_at = [], at
    with pytest.raises(Killed):
        sweep()
    drawn.kill_at = None
    assert sweep() == 0
    assert sorted(drawn.done) == sorted(ALL)  # nothing was run twice
    assert (tmp_path / "out" / "law.json").read_text() == (tmp_path / "straight" / "law.json").read_text()


def test_a_failed_run_stops_the_sweep_and_is_tried_again(sweep, drawn, capsys):
    drawn.fail_at = 3
    assert sweep() == 1
    out = capsys.readouterr().out
    assert "the disk is full" in out
    assert out.endswith("; the same command continues\n")
    assert len(drawn.done) == 3
    drawn.fail_at = None
    assert sweep() == 0
    assert len(drawn.done) == 12


def test_a_run_that_diverged_stops_the_sweep_and_one_that_fell_short_does_not(sweep, drawn, capsys):
    drawn.fail_at, drawn.failure = 0, (1, "diverged at step 7: lower learning_rate")  # before its end
    assert sweep() == 1
    out = capsys.readouterr().out
    assert "lower learning_rate" in out
    assert "the same command" not in out
    drawn.fail_at, drawn.verdict = None, {"ok": False, "problem": "DIVERGED", "reason": "above the start"}
    assert sweep(folder="whole") == 1
    assert len(drawn.done) == 2
    assert "diverged: above the start; lower learning_rate" in capsys.readouterr().out
    drawn.verdict |= {"problem": "FELL SHORT"}
    drawn.done, drawn.kill_at = [], 4
    with pytest.raises(Killed):
        sweep(folder="short")
    assert len(drawn.done) == 4


def test_runs_that_carry_no_law_leave_none(sweep, drawn, tmp_path, capsys):
    drawn.sign = -1
    assert sweep("--seeds", "1") == 1
    assert not (tmp_path / "out" / "law.json").exists()
    assert "does not fall" in capsys.readouterr().out


def test_a_start_that_fails_keeps_the_law_of_the_same_runs(sweep, drawn, tmp_path):
    sweep()
    law = tmp_path / "out" / "law.json"
    before = law.read_text()
    largest = next((tmp_path / "out" / "runs").glob("*/model/castlm.json"))
    record = largest.read_text()
    largest.write_text("{")
    assert sweep() == 1
    assert law.read_text() == before
    largest.write_text(record)
    assert sweep() == 0


def test_another_sweep_is_refused(sweep, drawn, capsys):
    sweep("--seeds", "1")
    before = len(drawn.done)
    assert sweep("--seeds", "2") == 2
    assert len(drawn.done) == before
    assert "--runs-from" in capsys.readouterr().err
    assert sweep("--runs-from", "nowhere", folder="second") == 2
    assert "runs_from nowhere" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_alone(sweep, drawn, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text("{}")
    assert sweep() == 2
    assert "no output of castlm sweep" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert sweep(folder="file") == 2
    assert not drawn.done


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--largest-tokens"),
        (["--largest-tokens", "1e6", "--tokens", "1,2"], "leave out --largest-tokens"),
        (["--largest-tokens", "1e6", "--smallest-tokens", "2e6"], "2e+06 to 1e+06"),
        (["--largest-tokens", "nan"], "nan"),
        (["--largest-tokens", "1e6", "--budgets", "1"], "budgets = 1"),
        (["--largest-tokens", "1e6", "--budgets", "3"], "a law needs 4 distinct token budgets, found 3"),
        (["--largest-tokens", "1e6", "--smallest-tokens", "5e5"], "a factor of 2, 4 is the least"),
        (["--largest-tokens", "640"], "less than one step of 64"),
        (["--largest-tokens", "640", "--smallest-tokens", "64", "--budgets", "20"], "in whole steps, are one"),
        (["--largest-tokens", "1e6", "--budgets", "1000000"], "budgets = 1000000"),
        (["--largest-tokens", "1e6", "--seeds", "0"], "seeds = 0"),
        (["--largest-tokens", "1e6", "--model", "no where"], "no where"),
        (["--largest-tokens", "1e6", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--tokens", "1e5,many"], "tokens = 'many'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named, files, drawn, tmp_path, capsys):
    assert_refused([(["plan", "sweep", *files, "--output-dir", str(tmp_path / "out"), *arguments], named)], capsys)
    assert not (tmp_path / "out").exists()
    assert not drawn.done


def test_a_method_without_training_is_refused(sweep, tmp_path, drawn, capsys):
    (tmp_path / "wanda.yaml").write_text("method: wanda\n")
    assert sweep("--config", str(tmp_path / "wanda.yaml")) == 2
    assert "method wanda has no training budget" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_and_a_kill_amid_one_of_them(files, tmp_path, monkeypatch):
    def run_here(arguments, log):
        log.write_text("")
        return main(arguments)

    monkeypatch.setattr(runs, "run_process", run_here)
    config = tmp_path / "config.yaml"
    fields = {"method": "ste", "eta": 0.0, "learning_rate": 0.003, "eval_steps": 1000}
    config.write_text(yaml.safe_dump({**fields, "calibration_sequences": 4, "rotation_iterations": 4}))
    base = ["plan", "sweep", *files, "--config", str(config), "--seeds", "1"]
    base += ["--tokens", ",".join(str(STEP * n) for n in (2, 4, 8, 40))]
    with killed_in(Trainer, "train_step", call=2 + 4 + 8 + 25):  # in the last run
        main([*base, "--output-dir", str(tmp_path / "killed")])
    steps: list[int] = []
    before_each_step(monkeypatch, lambda run: steps.append(run.step))
    assert main([*base, "--output-dir", str(tmp_path / "killed")]) == 0
    first = steps[0]
    assert first in (10, 20)  # it saves at every fourth of its steps; the newest save may not have been whole
    assert steps == [*range(first, 40)]
    records = [json.loads(file.read_text()) for file in (tmp_path / "killed").glob("runs/*/model/castlm.json")]
    (resumed,) = [record["config"] for record in records if record["train_steps"] == 40]
    straight = TrainConfig.from_mapping({**resumed, "output_dir": str(tmp_path / "straight"), "resume": False})
    (perplexity,) = [record["perplexity"]["pruned"] for record in records if record["train_steps"] == 40]
    assert perplexity == train(straight).perplexity.pruned
    assert not list(tmp_path.glob("killed/runs/dense*"))


def test_finished_runs_of_another_folder_are_not_run_again(sweep, drawn, tmp_path):
    sweep()
    done = list(drawn.done)
    assert sweep("--runs-from", str(tmp_path / "out"), folder="second") == 0
    assert drawn.done == done
    assert (tmp_path / "second" / "law.json").read_text() == (tmp_path / "out" / "law.json").read_text()
    assert not (tmp_path / "second" / "runs").exists()
    sweep("--runs-from", str(tmp_path / "out"), "--seeds", "3", folder="third")
    assert [run for run in drawn.done if run not in done] == [(steps, 2) for steps, seed in done if seed == 0]


def test_a_prediction_reads_the_runs_of_a_sweep_as_it_reads_their_law(sweep, drawn, tmp_path, capsys):
    sweep()
    said = []
    for name in ("out/law.json", "out", "out/runs"):
        capsys.readouterr()
        assert main(["plan", "predict", str(tmp_path / name), "--tokens", "1e6"]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0].startswith("1e+06 tokens: perplexity ")
    assert len(set(said)) == 1
