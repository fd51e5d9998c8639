"""castlm plan sweep: where it stops, its files, and a sweep after a kill. All but one test draw their runs."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from castlm.cli.main import main
from castlm.compare import runs
from castlm.core.errors import InputError
from castlm.files.record import record_output
from castlm.planning import fit
from castlm.planning.law import Law, predict_perplexity
from castlm.planning.sweep import check_budgets, geometric_budgets
from castlm.training.config import TrainConfig
from castlm.training.run import Run as TrainingRun
from castlm.training.train import train
from tests.tiny import TEXT, save_tiny

STEP = 64  # tokens
LARGEST = 64 * 64 * STEP


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.txt").write_text(TEXT)
    (folder / "eval.txt").write_text(TEXT[:2000])
    model = save_tiny(folder / "model")
    named = ["--model", str(model), "--dataset", str(folder / "train.txt"), "--eval-dataset", str(folder / "eval.txt")]
    return [*named, "--seq-len", "32", "--per-device-train-batch-size", "2", "--eval-tokens", "256"]


@pytest.fixture(scope="module", autouse=True)
def _each_law_is_fitted_once():
    """Most sweeps of this file draw the same runs."""
    known: dict[tuple, Law] = {}
    fitted = fit._fit

    def fit_once(data, form, num_draws, seed):
        arrays = tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in data)
        key = (arrays, form, num_draws, seed)
        if key not in known:
            known[key] = fitted(data, form, num_draws, seed)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_fit", fit_once)
        yield


@pytest.fixture
def sweep(files, tmp_path):
    """Runs the command in a folder; gives its exit code and its sweep.json."""

    def run(*more: str, folder: str = "out") -> tuple[int, dict]:
        budgets = [] if "--tokens" in more else ["--largest-tokens", str(LARGEST)]
        code = main(["plan", "sweep", *files, "--output-dir", str(tmp_path / folder), *budgets, *more])
        return code, json.loads((tmp_path / folder / "sweep.json").read_text())

    return run


class Drawn:
    """Stands for the processes of runs: writes results that follow a law, and keeps the runs it was asked for."""

    def __init__(self) -> None:
        self.noise, self.bend, self.sign = 1e-4, {}, 1
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
        record = {"method": "cast", "config": {"seed": seed}, "train_tokens": tokens, "num_params": 1000}
        record["perplexity"] = {"pruned": self.perplexity(tokens, seed)}
        record |= {} if self.verdict is None else {"verdict": self.verdict}
        (folder / "castlm.json").write_text(json.dumps(record))
        record_output(folder, command="result", checksums=True)
        (folder.parent / "castlm-output.json").write_text('{"command": "train"}')
        return 0

    def perplexity(self, tokens: int, seed: int) -> float:
        loss = 1.5 + self.sign * 20 * tokens**-0.4 + self.bend.get(tokens, 0.0)
        return math.exp(loss * math.exp(self.noise * random.Random(tokens + seed).gauss(0, 1)))


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    stand_in = Drawn()
    monkeypatch.setattr(runs, "run_process", stand_in)
    return stand_in


def test_the_largest_is_not_run_when_it_is_predicted(sweep, drawn, tmp_path, capsys):
    code, said = sweep()
    assert code == 0
    budgets = said["budgets"]
    assert [b // STEP for b in budgets] == [64, 147, 337, 776, 1782, 4096]
    assert drawn.done == [(b // STEP, seed) for b in budgets[:5] for seed in (0, 1)]
    assert said["status"] == "predicted"
    steps = said["steps"]
    assert [step["inside"] for step in steps] == [None, None, None, None, True]
    assert steps[2]["largest"] is None
    assert steps[3]["largest"]["tokens"] == LARGEST
    predicted, width = steps[4]["largest"], steps[4]["width"]
    assert predicted["low"] < drawn.perplexity(LARGEST, 0) < predicted["high"]
    assert width == pytest.approx((predicted["high"] - predicted["low"]) / predicted["perplexity"])
    assert width < said["within"] == 0.02
    assert said["trained_tokens"] == 2 * sum(budgets[:5])
    assert said["saved_tokens"] == 2 * LARGEST
    law = Law.from_dict(json.loads((tmp_path / "out" / "law.json").read_text()))
    assert law.num_points == 10
    assert predict_perplexity(law, LARGEST).high == pytest.approx(predicted["high"])
    out = capsys.readouterr().out
    assert "the largest was not run" in out
    assert f"{predicted['low']:.4f} to {predicted['high']:.4f}" in out
    assert f"{2 * LARGEST:,} saved" in out
    assert main(["plan", "predict", str(tmp_path / "out" / "law.json"), "--tokens", "1e6"]) == 0


def test_a_longer_series_is_cut_where_it_is_predicted(sweep, drawn):
    _, said = sweep("--budgets", "8", "--within", "0.1")
    assert len(said["steps"]) == 5
    assert said["saved_tokens"] == 2 * sum(said["budgets"][5:])


def test_the_largest_is_run_when_the_last_budget_fell_outside(sweep, drawn, capsys):
    drawn.bend = {1782 * STEP: 0.05}
    code, said = sweep("--within", "10")
    assert code == 0
    assert said["status"] == "complete"
    assert [step["inside"] for step in said["steps"][4:]] == [False, True]
    assert len(drawn.done) == 12
    assert said["saved_tokens"] == 0
    assert "inside the predicted interval" in capsys.readouterr().out


def test_the_largest_is_run_when_its_interval_is_wide_and_is_never_said_to_be_saved_then(sweep, drawn, tmp_path):
    drawn.noise = 3e-3
    _, said = sweep("--within", "1e-3", "--seeds", "3")
    assert said["status"] == "complete"
    assert said["steps"][4]["width"] > 1e-3
    assert said["steps"][5]["largest"] is None
    measured = [drawn.perplexity(LARGEST, seed) for seed in range(3)]
    assert said["steps"][5]["perplexities"] == pytest.approx(measured)
    law = Law.from_dict(json.loads((tmp_path / "out" / "law.json").read_text()))
    assert law.holdout.predicted == pytest.approx(said["steps"][5]["predicted"]["perplexity"])
    _, again = sweep("--within", "1", "--seeds", "3")
    assert len(drawn.done) == 18
    assert again["steps"] == said["steps"]
    assert (again["status"], again["saved_tokens"]) == ("complete", 0)


def test_a_narrower_interval_asked_for_later_runs_the_largest_too(sweep, drawn):
    _, said = sweep()
    assert said["status"] == "predicted"
    _, said = sweep("--within", "1e-9")
    assert said["status"] == "complete"
    assert len(drawn.done) == 12


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_a_killed_sweep_goes_on(at, sweep, drawn, tmp_path):
    _, straight = sweep(folder="straight")
    drawn.done, drawn.kill_at = [], at
    with pytest.raises(Killed):
        sweep()
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["status"] == "running"
    drawn.kill_at = None
    _, said = sweep()
    assert len(drawn.done) == 10
    assert len(set(drawn.done)) == 10  # nothing was run twice
    assert {**said, "command": ""} == {**straight, "command": ""}


def test_a_failed_run_stops_the_sweep_and_is_tried_again(sweep, drawn, capsys):
    drawn.fail_at = 3
    code, said = sweep()
    assert code == 1
    assert said["status"] == "failed"
    assert "the disk is full" in said["verdict"]
    assert said["verdict"].endswith("; the same command continues")
    assert len(said["steps"]) == 1
    drawn.fail_at = None
    code, said = sweep()
    assert (code, said["status"], len(drawn.done)) == (0, "predicted", 10)


def test_the_same_command_is_no_remedy_for_a_run_that_diverged_before_its_end(sweep, drawn):
    drawn.fail_at, drawn.failure = 0, (1, "diverged at step 7: lower learning_rate")
    code, said = sweep()
    assert (code, said["status"]) == (1, "failed")
    assert "lower learning_rate" in said["verdict"]
    assert "the same command" not in said["verdict"]


def test_a_run_that_diverged_stops_the_sweep_and_one_that_fell_short_does_not(sweep, drawn):
    drawn.verdict = {"ok": False, "problem": "DIVERGED", "reason": "above the start"}
    code, said = sweep()
    assert (code, said["status"], len(drawn.done)) == (1, "failed", 2)
    assert "diverged: above the start; lower learning_rate" in said["verdict"]
    drawn.verdict |= {"problem": "FELL SHORT"}
    drawn.done, drawn.kill_at = [], 4
    with pytest.raises(Killed):
        sweep(folder="short")
    assert len(drawn.done) == 4


def test_runs_that_carry_no_law_are_said_to(sweep, drawn, tmp_path, capsys):
    drawn.sign = -1
    code, said = sweep("--seeds", "1")
    assert code == 1
    assert said["status"] == "complete"
    assert len(said["steps"]) == 6
    assert "does not fall" in said["steps"][-1]["no_law"]
    assert not (tmp_path / "out" / "law.json").exists()
    assert "no law.json" in capsys.readouterr().out


def test_a_start_that_fails_keeps_the_law_of_the_same_runs(sweep, drawn, tmp_path):
    _, said = sweep("--within", "1e-9")
    law = tmp_path / "out" / "law.json"
    before = law.read_text()
    largest = [
        file
        for file in (tmp_path / "out" / "runs").glob("*/model/castlm.json")
        if json.loads(file.read_text())["train_tokens"] == said["budgets"][-1]
    ]
    records = [file.read_text() for file in largest]
    for file in largest:
        file.write_text("{")
    code, said = sweep("--within", "1e-9")
    assert (code, said["status"], law.read_text()) == (1, "failed", before)
    for file, record in zip(largest, records):
        file.write_text(record)
    assert sweep("--within", "1e-9")[0] == 0


def test_another_sweep_is_refused(sweep, drawn, capsys):
    sweep("--seeds", "1")
    before = len(drawn.done)
    code, said = sweep("--seeds", "2")
    assert (code, said["seeds"], len(drawn.done)) == (2, 1, before)
    assert "--runs-from" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_alone(files, drawn, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text("{}")
    arguments = ["plan", "sweep", *files, "--output-dir", str(tmp_path / "out"), "--largest-tokens", str(LARGEST)]
    assert main(arguments) == 2
    assert "no output of castlm sweep" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*arguments, "--output-dir", str(tmp_path / "file")]) == 2
    assert not drawn.done


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--largest-tokens"),
        (["--largest-tokens", "1e6", "--tokens", "1,2"], "leave out --largest-tokens"),
        (["--largest-tokens", "1e6", "--smallest-tokens", "2e6"], "2e+06 to 1e+06"),
        (["--largest-tokens", "nan"], "nan"),
        (["--largest-tokens", "1e6", "--budgets", "1"], "budgets = 1"),
        (["--largest-tokens", "1e6", "--budgets", "4"], "4 budgets: the power form needs 5"),
        (["--largest-tokens", "1e6", "--smallest-tokens", "5e5"], "a factor of 4"),
        (["--largest-tokens", "640"], "less than one step of 64"),
        (["--largest-tokens", "640", "--smallest-tokens", "64", "--budgets", "20"], "in whole steps, are one"),
        (["--largest-tokens", "1e6", "--seeds", "0"], "seeds = 0"),
        (["--largest-tokens", "1e6", "--model", "no where"], "no where"),
        (["--largest-tokens", "1e6", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--tokens", "1e5,many"], "tokens = 'many'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named, files, drawn, tmp_path, capsys):
    assert main(["plan", "sweep", *files, "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not drawn.done


def test_a_method_without_training_is_refused(sweep, tmp_path, drawn, files, capsys):
    (tmp_path / "wanda.yaml").write_text("method: wanda\n")
    arguments = ["plan", "sweep", *files, "--output-dir", str(tmp_path / "out"), "--largest-tokens", "1e6"]
    assert main([*arguments, "--config", str(tmp_path / "wanda.yaml")]) == 2
    assert "method wanda has no training budget" in capsys.readouterr().err


def test_budgets_are_a_geometric_series():
    assert geometric_budgets(1e6, 1e3, 4) == [1000, 10_000, 100_000, 1_000_000]
    assert geometric_budgets(6400, None, 7)[0] == 100
    check_budgets(geometric_budgets(1e6, None, 4), "loglinear")
    with pytest.raises(InputError, match=r"needs 5 .*--form loglinear"):
        check_budgets(geometric_budgets(1e6, None, 4), "power")


@pytest.mark.slow
def test_real_runs_and_a_kill_amid_one_of_them(files, tmp_path, monkeypatch):
    def run_here(arguments, log):
        log.write_text("")
        return main(arguments[1:])

    monkeypatch.setattr(runs, "run_process", run_here)
    config = tmp_path / "config.yaml"
    fields = {"method": "ste", "eta": 0.0, "learning_rate": 0.003, "eval_steps": 1000}
    config.write_text(yaml.safe_dump({**fields, "calibration_sequences": 4, "rotation_iterations": 4}))
    base = ["plan", "sweep", *files, "--config", str(config), "--seeds", "1", "--form", "loglinear", "--within", "1e-9"]
    base += ["--tokens", ",".join(str(STEP * n) for n in (2, 4, 8, 16))]
    original, steps = TrainingRun.train_step, []

    def until_killed(self):
        if self.config.optimizer.max_steps == 8 and self.progress.step == 5:
            raise Killed
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train_step", until_killed)
        with pytest.raises(Killed):
            main([*base, "--output-dir", str(tmp_path / "killed")])
    monkeypatch.setattr(TrainingRun, "train_step", lambda self: (steps.append(self.progress.step), original(self)))
    assert main([*base, "--output-dir", str(tmp_path / "killed")]) == 0
    first = steps[0]
    assert 2 <= first <= 5  # it saves at every fourth of its steps; the newest save may not have been whole
    assert steps == [*range(first, 8), *range(16)]
    killed = json.loads((tmp_path / "killed" / "sweep.json").read_text())
    records = [json.loads(file.read_text()) for file in (tmp_path / "killed").glob("runs/*/model/castlm.json")]
    (resumed,) = [record["config"] for record in records if record["train_steps"] == 8]
    straight = TrainConfig.from_mapping({**resumed, "output_dir": str(tmp_path / "straight"), "resume": False})
    assert killed["steps"][2]["perplexities"] == [train(straight)["perplexity"]["pruned"]]
    assert killed["status"] == "complete"
    assert len(killed["steps"]) == 4
    assert killed["steps"][-1]["predicted"] is not None
    assert not list(tmp_path.glob("killed/runs/dense*"))


def test_finished_runs_of_another_folder_are_not_run_again(sweep, drawn, tmp_path):
    _, first = sweep()
    done = list(drawn.done)
    code, second = sweep("--runs-from", str(tmp_path / "out"), folder="second")
    assert code == 0
    assert drawn.done == done
    assert second["steps"] == first["steps"]
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
