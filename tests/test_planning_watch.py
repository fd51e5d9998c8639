"""A run's end is read from its curve: on curves drawn from a law, and on one that castlm's loop did trace."""

import json
import math

import pytest

from castlm.core.errors import DivergedError, InputError
from castlm.planning.watch import backtest_run, extrapolate_run, watch_run
from castlm.training.metrics_file import evaluations, read_metrics

TOKENS = 4096  # a step
# A real run: stories260K made 2:4 in 150 steps of 8 x 512 tokens of TinyStories, horizon decay until step 75, defaults.
REAL = """
0:154.061 5:110.679 10:87.098 15:64.850 20:56.924 25:48.027 30:40.452 35:35.626 40:31.345 45:26.401 50:22.526 55:18.937
60:16.203 65:12.589 70:10.104 75:8.374 80:7.776 85:7.505 90:7.376 95:7.243 100:7.086 105:7.031 110:6.950 115:6.883
120:6.864 125:6.848 130:6.799 135:6.786 140:6.751 145:6.749 150:6.757
"""


def rows(total_steps=100, every=5, floor=1.5, b=0.9, beta=0.35, end=0.5, upto=1.0, decays=True):
    """Evaluations of a run whose ramp ends at `end`; loss = floor + b * (steps since then)^-beta afterwards."""
    out = []
    for step in range(every, int(upto * total_steps) + 1, every):
        alpha = min(1.0, (step - 1) / (end * total_steps)) if decays else None
        since = step - (end * total_steps if decays else 0)
        ppl = math.exp(floor + b * since**-beta) if since > 0 else 200.0 / step
        row = {"step": step, "tokens": step * TOKENS, "prune_now_ppl": ppl}
        out.append(row if alpha is None else {**row, "alpha": alpha})
    return out


def truth(total_steps=100, end=0.5, floor=1.5, b=0.9, beta=0.35):
    return math.exp(floor + b * (total_steps * (1 - end)) ** -beta)


def test_end_is_extrapolated_from_the_healing_alone():
    report = extrapolate_run(rows(upto=0.8), total_steps=100)
    assert report.verdict == "no target"
    assert (report.num_used, report.num_excluded) == (6, 10)
    assert report.predicted == pytest.approx(truth(), rel=2e-3)
    assert report.low <= truth() <= report.high
    assert report.final_tokens == 100 * TOKENS
    assert extrapolate_run(rows(upto=0.8), final_tokens=100 * TOKENS) == report


@pytest.mark.parametrize(("upto", "used"), [(0.05, 0), (0.5, 0), (0.55, 1), (0.6, 2)])
def test_too_early(upto, used):
    report = extrapolate_run(rows(upto=upto), total_steps=100, target_ppl=5)
    assert report.verdict == "too early"
    assert report.num_used == used
    assert report.predicted is None
    assert "3 are needed" in report.message


@pytest.mark.parametrize(("factor", "verdict"), [(0.7, "will miss"), (1.3, "on target")])
def test_target_outside_the_interval(factor, verdict):
    report = extrapolate_run(rows(upto=0.8), total_steps=100, target_ppl=truth() * factor)
    assert report.verdict == verdict
    assert verdict in report.message


def test_target_inside_the_interval_is_uncertain():
    wavy = [
        {**r, "prune_now_ppl": r["prune_now_ppl"] * (1.02 if i % 2 else 0.98)} for i, r in enumerate(rows(upto=0.8))
    ]
    assert extrapolate_run(wavy, total_steps=100, target_ppl=truth()).verdict == "uncertain"


def test_ramp_that_ends_between_evaluations_is_found():
    report = extrapolate_run(rows(end=0.47, upto=0.9), total_steps=100)
    assert report.predicted == pytest.approx(truth(end=0.47), rel=5e-3)


def test_many_evaluations_are_no_reason_to_wait():
    report = extrapolate_run(rows(total_steps=1000, every=5, end=0.1, upto=0.7), total_steps=1000)
    assert report.num_used == 120
    assert report.predicted == pytest.approx(truth(total_steps=1000, end=0.1), rel=2e-3)
    assert "(90 %: " in report.message


@pytest.mark.parametrize("decay", ["proportional", None])
def test_methods_whose_decay_never_ends_use_the_whole_curve(decay):
    report = extrapolate_run(rows(upto=0.6, decays=False), total_steps=100, decay=decay)
    assert (report.num_used, report.num_excluded) == (12, 0)
    assert "of the whole curve" in report.message
    assert report.predicted == pytest.approx(truth(end=0), rel=5e-3)


def test_a_curve_that_rises_is_not_extrapolated():
    rising = [{**r, "prune_now_ppl": 5 + r["step"] / 100} for r in rows(upto=0.9)]
    report = extrapolate_run(rising, total_steps=100)
    assert report.verdict == "too early"
    assert "does not fall" in report.message


def test_bad_input_is_named():
    with pytest.raises(InputError, match="total_steps or final_tokens"):
        extrapolate_run(rows())
    with pytest.raises(InputError, match="no evaluation"):
        extrapolate_run([], total_steps=100)
    with pytest.raises(InputError, match="evaluation 1 has no tokens"):
        extrapolate_run([{"step": 1, "prune_now_ppl": 5}], total_steps=100)
    with pytest.raises(InputError, match="above 1"):
        extrapolate_run(rows(), total_steps=100, target_ppl=0.5)
    with pytest.raises(InputError, match="no evaluation"):
        backtest_run([])


def real_rows():
    curve = [pair.split(":") for pair in REAL.split()]
    return [
        {"step": int(s), "tokens": int(s) * TOKENS, "prune_now_ppl": float(p), "alpha": min(1.0, (int(s) - 1) / 75)}
        for s, p in curve
    ]


@pytest.mark.slow
def test_real_run_ends_about_where_it_was_said_to_wherever_it_is_looked_at():
    reports = backtest_run(real_rows())
    assert [fraction for fraction, _, _ in reports] == [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    for _, report, measured in reports:
        assert measured == 6.757
        assert report.predicted == pytest.approx(measured, rel=0.02)
    assert sum(report.low <= measured <= report.high for _, report, measured in reports) >= 7
    assert reports[0][1].num_used == 3


def write_run(folder, lines, **config):
    config = {"max_steps": 150, "decay": "horizon", "method": "cast", **config}
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def split(row):
    """As the loop writes it: the step's row with alpha, then the evaluation's without."""
    evaluation = {key: value for key, value in row.items() if key != "alpha"}
    return [{"step": row["step"], "tokens": row["tokens"], "loss": 1.0, "alpha": row["alpha"]}, evaluation]


def test_run_folder_is_read(tmp_path):
    seen = real_rows()[1:25]
    write_run(tmp_path, [line for row in seen for line in split(row)])
    assert evaluations(read_metrics(tmp_path)) == seen
    report = watch_run(tmp_path, target_ppl=6.0)
    assert report == extrapolate_run(seen, total_steps=150, target_ppl=6.0)
    assert report.verdict == "will miss"


def test_a_run_that_logs_seldom_is_read_as_one_that_logs_each_step(tmp_path):
    seen = real_rows()[1:]
    lines = [line for row in seen for line in split(row)]
    write_run(tmp_path, [line for line in lines if "loss" not in line or line["step"] % 50 == 0 or line["step"] == 5])
    found = evaluations(read_metrics(tmp_path))
    assert [row["alpha"] for row in found] == pytest.approx([row["alpha"] for row in seen])


def test_evaluations_that_are_not_finite_are_left_out(tmp_path):
    seen = real_rows()[1:25]
    rows = [{**row, "prune_now_ppl": bad} for row, bad in zip(seen, (math.inf, math.nan, None))] + seen[3:]
    write_run(tmp_path, [line for row in rows for line in split(row)])
    assert evaluations(read_metrics(tmp_path)) == seen[3:]
    assert watch_run(tmp_path).predicted is not None


@pytest.mark.parametrize("bad", [math.inf, math.nan, None])
def test_a_run_whose_last_evaluation_is_not_finite_has_diverged(bad, tmp_path):
    seen = real_rows()[1:25]
    write_run(tmp_path, [line for row in [*seen[:-1], {**seen[-1], "prune_now_ppl": bad}] for line in split(row)])
    with pytest.raises(DivergedError, match=f"step {seen[-1]['step']} is not finite: the run has diverged"):
        watch_run(tmp_path, target_ppl=20.0)


@pytest.mark.parametrize("step", [None, "5", 10**400])
def test_a_row_without_a_step_is_named(step, tmp_path):
    write_run(tmp_path, [{**row, "step": step} if i == 2 else row for i, row in enumerate(real_rows())])
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 3: step is .*, a number was expected"):
        watch_run(tmp_path)


def test_run_folder_of_a_rival_uses_the_whole_curve(tmp_path):
    write_run(tmp_path, rows(decays=False, upto=0.6), max_steps=100, method="ste")
    assert watch_run(tmp_path).num_excluded == 0


def test_a_row_cut_off_by_a_kill_is_dropped_and_any_other_is_named(tmp_path):
    write_run(tmp_path, real_rows())
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    assert len(evaluations(read_metrics(tmp_path))) == len(real_rows()) - 1
    path.write_text("[1]\n" + text)
    with pytest.raises(InputError, match="line 1: a JSON object was expected"):
        read_metrics(tmp_path)
    path.write_text("{oops\n" + text)
    with pytest.raises(InputError, match="line 1: not a JSON object"):
        read_metrics(tmp_path)


def test_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        watch_run(tmp_path)
