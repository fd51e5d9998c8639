"""`castlm plan` from its command line: the first steps of a real run, and what each command prints and returns."""

import json
import math
from pathlib import Path

import pytest

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.lab.planning.law import check_plot
from castlm.oneshot.folder import StartFolder
from castlm.training import start
from castlm.training.first_steps import measure_first_steps
from castlm.training.train import train
from castlm.world import init_world
from tests.refusals import assert_refused
from tests.runs import begin_run, small, take_steps

CHECK = ["plan", "check", "--model", "m", "--dataset", "d", "--output-dir", "o"]


def test_the_first_steps_measure_the_momentum_of_the_run_itself(llama, text, tmp_path):
    over = {"decay": "proportional", "max_steps": 30, "ignore_decay_budget": True, "init_from": "magnitude"}
    config = small(llama, text, tmp_path / "run", **over)
    found = measure_first_steps(config, init_world("cpu", "full"), steps=4)
    run = begin_run(config)
    take_steps(run, 4)
    name, layer = next(iter(run.method.layers.items()))
    momentum = run.optimizer.state[layer.parametrizations.weight.original]["exp_avg"]
    expected = math.sqrt(momentum.square().mean()) / (1 - config.optimizer.adam_betas[0] ** 4)
    assert found.momentum_rms[name] == pytest.approx(expected, rel=1e-5)
    assert found.tokens_per_step == 4 * 32
    assert len(found.budgets) == 14
    assert 0 < min(found.momentum_rms.values()) <= found.lam


def test_lam_auto_is_measured_recorded_and_kept_on_resume(llama, text, tmp_path):
    over = {"decay": "additive", "lam": "auto", "ignore_decay_budget": True, "init_from": "magnitude"}
    config = small(llama, text, tmp_path / "run", **over, save_steps=6)
    facts = train(config)
    assert 0 < facts.config["lam"] < 1
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert saved["config"]["lam"] == facts.config["lam"]


def test_a_run_takes_the_start_on_which_its_lam_was_measured(llama, text, tmp_path, monkeypatch):
    solved = []
    write = StartFolder.write_block
    monkeypatch.setattr(StartFolder, "write_block", lambda *args: (solved.append(args[1]), write(*args)))
    over = {"decay": "additive", "lam": "auto", "ignore_decay_budget": True, "max_steps": 2}
    train(small(llama, text, tmp_path / "run", **over, calibration_sequences=2, init_from="wanda"))
    assert solved == [0, 1]
    assert not (tmp_path / "run.partial").exists()


def test_a_start_that_does_not_fit_is_refused_before_it_loads_the_model(llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "available_memory", lambda device: 1e5)
    with pytest.raises(InputError, match=r"0\.0 GiB are free.*--memory block"):
        train(small(llama, text, tmp_path / "run", init_from="wanda"))


def arguments(llama: str, text: str, *more: str) -> list[str]:
    base = ["plan", "check", "--model", llama, "--dataset", text, "--output-dir", "unused", "--seq-len", "32"]
    start = ["--calibration-sequences", "4"]
    return [*base, "--max-steps", "30", "--per-device-train-batch-size", "2", *start, *more]


def test_check_says_whether_a_run_can_converge_and_how_long_it_takes(llama, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(llama, text)) == 0
    out = capsys.readouterr().out
    assert "reach zero" in out
    assert float(out.partition(" tokens/s")[0].splitlines()[-1].replace(",", "")) > 0
    assert float(out.partition("start: ")[2].partition(" s before")[0]) >= 0  # tenths
    assert main(arguments(llama, text, "--decay", "proportional")) == 2  # another start is in the folder
    assert "unused.partial" in capsys.readouterr().err
    assert main(arguments(llama, text, "--decay", "proportional", "--overwrite")) == 1
    out = capsys.readouterr().out
    assert "14 of 14 layers cannot reach zero" in out
    assert "the learning rate" in out
    assert main(arguments(llama, text, "--method", "ste")) == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["unused.partial"]


def test_fit_and_predict(law, capsys):
    fitted = json.loads(Path(law[1]).read_text())
    assert fitted["L_inf"] == pytest.approx(2.0, abs=0.02)
    assert fitted["beta"] == pytest.approx(0.4, abs=0.02)
    assert fitted["r2"] > 0.999
    capsys.readouterr()
    predict = ["plan", "predict", law[1]]
    assert main([*predict, "--tokens", "1e7", "--tokens-per-s", "1000"]) == 0
    out = capsys.readouterr().out
    assert f"{math.exp(2.0 + 50 * 1e7**-0.4):.3f}" in out
    assert "2.78 hours" in out
    assert main([*predict, "--target-ppl", "5"]) == 1
    assert "cannot be reached" in capsys.readouterr().out


@pytest.fixture
def law(tmp_path) -> tuple[str, str]:
    """A CSV of runs, and the law fitted to it."""
    rows = [f"{d},{math.exp(2.0 + 50 * d**-0.4)}" for d in (1e4, 3e4, 1e5, 3e5, 1e6, 3e6)]
    runs, law = tmp_path / "runs.csv", tmp_path / "law.json"
    runs.write_text("tokens,perplexity\n" + "\n".join(rows) + "\n")
    assert main(["plan", "fit", str(runs), "--json", str(law)]) == 0
    return str(runs), str(law)


def test_fit_and_predict_refuse_what_they_would_not_use_and_say_how_far_outside_a_budget_lies(law, tmp_path, capsys):
    predict = ["plan", "predict", law[1]]
    (tmp_path / "again.csv").symlink_to(law[0])
    cases = [
        (["plan", "fit", law[0], str(tmp_path / "again.csv")], "is given twice, and would count as two runs"),
        ([*predict, "--target-ppl", "20", "--tokens-per-s", "0"], "--tokens-per-s = 0.0"),
        ([*predict, "--target-ppl", "1e308"], "--target-ppl = 1e+308"),
        ([*predict, "--tokens", "1e9"], "--tokens 1e+09 is 333 times the largest run of the law, 3e+06 tokens"),
        ([*predict, "--target-ppl", "7.41"], "give --force"),
    ]
    assert_refused(cases, capsys)
    assert main([*predict, "--tokens", "1e9", "--force"]) == 0
    assert "333.3x beyond" in capsys.readouterr().out
    assert main([*predict, "--tokens", "5e3"]) == 0
    assert "2.0x below the fitted budgets" in capsys.readouterr().out
    content = json.loads(Path(law[1]).read_text())
    del content["holdout"]
    Path(law[1]).write_text(json.dumps(content))
    assert_refused([([*predict, "--tokens", "1e7"], "'holdout'")], capsys)


@pytest.mark.slow
def test_a_plot_replaces_nothing_but_a_plot(law, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    fit, photo, linked = ["plan", "fit", law[0]], tmp_path / "photo.png", tmp_path / "linked.svg"
    photo.write_text("mine")
    linked.symlink_to(law[0])
    both = str(tmp_path / "both.svg")
    cases = [
        ([*fit, "--plot", str(tmp_path / "law.xyz")], "law.xyz: its name must end in .pdf"),
        ([*fit, "--plot", str(photo)], "photo.png exists and is not a plot of castlm plan fit"),
        ([*fit, "--plot", str(linked)], "linked.svg exists and is not a plot"),
        ([*fit, "--plot", both, "--json", both], "both.svg"),
    ]
    assert_refused(cases, capsys)
    assert photo.read_text() == "mine"
    for name in ("law.svg", "law.svg", "law.png", "law.pdf"):
        assert main([*fit, "--plot", str(tmp_path / name)]) == 0
    check_plot(tmp_path / "law.png")
    check_plot(tmp_path / "law.pdf")
    assert not list(tmp_path.glob(".*"))


def test_memory(llama, capsys):
    assert main(["plan", "memory", "--model", llama, "--seq-len", "64", "--gpu", "0.5"]) == 1
    assert "peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan", "forecast"], "forecast"),
        (["plan", "predict", "/nowhere.json", "--tokens", "1"], "/nowhere.json"),
        (["plan", "fit", "/nowhere.csv"], "/nowhere.csv"),
        (["plan", "memory", "--model", "/nowhere.json"], "/nowhere.json"),
        (["plan", "memory", "--model", "m", "--gpu", "abacus"], "abacus"),
        (["plan", "memory", "--model", "m", "--push-to-hub"], "plan memory does not read --push-to-hub"),
        (["plan", "check", "--model", "m"], "dataset"),
        ([*CHECK, "--max-steps", "0"], "--max-steps = 0 is out of range"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named, capsys):
    assert_refused([(arguments, named)], capsys)
