"""The law is found again in data drawn from it, its intervals hold what they promise, and bad data are refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from castlm.core.errors import InputError
from castlm.lab.planning.fit import fit_law
from castlm.lab.planning.law import Law, plot_law, predict_perplexity, tokens_for
from castlm.lab.planning.points import Point, read_points
from tests.runs import RUN

L_INF, BETA = 1.6, 0.4
AMPLITUDE = 0.8 * 1e6**BETA  # 0.8 nats above the floor at a million tokens


def perplexity(tokens, L_inf=L_INF, b=AMPLITUDE, beta=BETA):
    return math.exp(L_inf + b * tokens**-beta)


def points(budgets, seeds=1, noise=0.0, rng=None, **law):
    """Runs whose log loss scatters by `noise` about the law."""
    factor = [1.0 if rng is None else math.exp(rng.normal(0, noise)) for _ in range(len(budgets) * seeds)]
    runs = [(tokens, seed) for tokens in budgets for seed in range(seeds)]
    return [Point(t, perplexity(t, **law) ** f, seed=s) for (t, s), f in zip(runs, factor)]


SEVEN = np.geomspace(1e6, 1e8, 7)


def test_power_law_is_recovered_from_noisy_points_within_its_intervals():
    law = fit_law(points(SEVEN, 3, 0.003, np.random.default_rng(0)), num_draws=60)
    assert law.L_inf == pytest.approx(L_INF, abs=0.05)
    for name, true in (("L_inf", L_INF), ("B", AMPLITUDE), ("beta", BETA)):
        low, high = law.intervals[name]
        assert low <= true <= high
    assert law.r2 > 0.99
    assert law.noise == pytest.approx(0.003, rel=0.5)


def test_one_wild_run_hardly_moves_the_law():
    runs = points(SEVEN, 3, 0.003, np.random.default_rng(1))
    clean = fit_law(runs, num_draws=5, leave_largest_out=False)
    wild = [*runs[:7], replace(runs[7], perplexity=runs[7].perplexity * 1.3), *runs[8:]]
    assert fit_law(wild, num_draws=5, leave_largest_out=False).L_inf == pytest.approx(clean.L_inf, abs=0.02)


def test_leave_largest_out_says_why_it_cannot_be_done_unless_seeds_make_up_for_a_budget():
    four = np.geomspace(1e6, 1e8, 4)
    law = fit_law(points(four), num_draws=5)
    assert law.holdout is None
    assert "4 distinct token budgets, found 3" in law.holdout_reason
    assert fit_law(points(four, 3, 0.002, np.random.default_rng(0)), num_draws=40).holdout is not None


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (points([1e6, 1e7, 1e8]), "needs 4 distinct token budgets, found 3"),
        (points([1e6, 1.001e6, 1e7, 1e8]), "found 3"),
        (points([1e6, 1.5e6, 2e6, 3e6]), "factor of 3, 4 is the least"),
        (points(SEVEN, b=-0.1, beta=0.1), "does not fall with tokens"),
        (points(SEVEN, L_inf=0.0, b=4.0, beta=0.05), "L_inf is at its bound 0"),
        (points([1e6, 1.5e6, 2e6, 4e6], L_inf=1, b=5 * 1e6**5, beta=5), "beta is at its bound"),
        ([*points(SEVEN), Point(math.nan, 5.0, source="x.csv, line 9")], "x.csv, line 9: tokens nan"),
        ([*points(SEVEN), Point(1e6, 0.5)], "perplexity above 1"),
        ([*points(SEVEN), Point(-1e6, 5.0)], "positive finite"),
        ([replace(p, params=1e6 * (i + 1)) for i, p in enumerate(points(SEVEN))], "7 values of params"),
        ([replace(p, method=m) for p, m in zip(points(SEVEN), "abababa")], "method (a; b)"),
        ([replace(p, pattern=x) for p, x in zip(points(SEVEN), ("2:4", "4:8") * 4)], "pattern (2:4; 4:8)"),
        ([replace(p, harness=h) for p, h in zip(points(SEVEN), "abababa")], "one eval_dataset"),
    ],
)
def test_data_that_cannot_carry_the_fit_are_refused(runs, reason):
    with pytest.raises(InputError) as error:
        fit_law(runs, num_draws=5)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def law():
    return fit_law(points(SEVEN, 3, 0.002, np.random.default_rng(3)), num_draws=60)


def test_a_law_names_the_runs_that_it_is_of():
    runs = [replace(p, method="cast", pattern="2:4", base_model="tiny") for p in points(SEVEN)]
    runs[0] = replace(runs[0], base_model="")  # a row of a CSV that does not say
    law = fit_law(runs, num_draws=5)
    assert law.runs_of == {"method": "cast", "pattern": "2:4", "base_model": "tiny"}
    assert Law.from_dict(json.loads(json.dumps(law.as_dict()))).runs_of == law.runs_of
    assert fit_law(points(SEVEN), num_draws=5).runs_of == {}


def test_law_survives_json_with_its_names_and_predictions(law):
    content = json.loads(json.dumps(law.as_dict()))
    assert {"L_inf", "B", "beta", "r2"} <= content.keys()
    assert set(content["intervals"]) == {"L_inf", "B", "beta", "r2"}
    again = Law.from_dict(content)
    assert again.holdout == law.holdout
    first, second = predict_perplexity(law, 5e8), predict_perplexity(again, 5e8)
    assert second.perplexity == first.perplexity
    assert second.low == pytest.approx(first.low, rel=1e-5)
    with pytest.raises(InputError, match="plan fit"):
        Law.from_dict({"draws": []})
    with pytest.raises(InputError, match="plan fit"):
        Law.from_dict({**content, "draws": [[1, 2]]})


def test_predictions_widen_with_distance_and_are_inverted_down_to_the_floor(law):
    near, far = predict_perplexity(law, 1e8), predict_perplexity(law, 1e10)
    assert near.perplexity == pytest.approx(perplexity(1e8), rel=0.01)
    assert (near.beyond, far.beyond) == (1, pytest.approx(100))
    assert far.high / far.low > near.high / near.low > 1
    needed = tokens_for(law, 6.0)
    assert predict_perplexity(law, needed.tokens).perplexity == pytest.approx(6.0)
    assert needed.low < needed.tokens < needed.high
    assert needed.probability == 1
    beyond = tokens_for(law, math.exp(L_INF) * 0.9)
    assert (beyond.tokens, beyond.high) == (None, math.inf)
    assert "cannot be reached" in str(beyond)
    assert beyond.floor_ppl == pytest.approx(math.exp(L_INF), rel=0.03)


def test_nothing_below_the_dense_model_is_predicted(law):
    dense = math.exp(L_INF) * 1.05
    bounded = replace(law, least_ppl=dense)
    near, far = predict_perplexity(bounded, 1e7), predict_perplexity(bounded, 1e14)
    assert (near.perplexity, near.is_least) == (predict_perplexity(law, 1e7).perplexity, False)
    assert (far.perplexity, far.low, far.is_least) == (dense, dense, True)
    assert tokens_for(bounded, dense * 0.99).tokens is None
    runs = [replace(point, dense=dense) for point in points(SEVEN)]
    assert fit_law(runs, num_draws=5).least_ppl == dense
    assert Law.from_dict(bounded.as_dict()).least_ppl == dense


def test_plot_is_written(law, tmp_path):
    pytest.importorskip("matplotlib")
    plot_law(law, points(SEVEN), tmp_path / "law.png")
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")


def run_record(tokens, ppl, seed=0, **measured):
    measured = {"seq_len": 512, "stride": 512, "text_sha256": "abc", "num_tokens": 1000, **measured}
    return {
        **RUN,
        "schema_version": 1,
        "verdict": {"ok": True, "reason": ""},
        "config": {"seed": seed},
        "perplexity": {"dense": 3.0, "pruned": ppl},
        "measured": {"text": "a.txt", "tokenizer": "t", "precision": "fp32", **measured},
        "num_params": 260_000,
        "train_tokens": tokens,
    }


def test_points_are_read_from_runs_results_and_csv(tmp_path):
    (tmp_path / "runs/a/model").mkdir(parents=True)
    (tmp_path / "runs/a/model/castlm.json").write_text(json.dumps(run_record(1000, 5.5, seed=7)))
    (tmp_path / "results.json").write_text(json.dumps({"results": [run_record(2000, 5.2), run_record(4000, 5.0)]}))
    (tmp_path / "other.csv").write_text("# a comment\ntokens, perplexity, params, note\n8e3, 4.9, 260000, best\n\n")
    found = read_points([tmp_path / "runs/a", tmp_path / "results.json", tmp_path / "other.csv"])
    assert [(p.tokens, p.perplexity) for p in found] == [(1000, 5.5), (2000, 5.2), (4000, 5.0), (8000, 4.9)]
    assert {p.params for p in found} == {260_000}
    assert found[0].seed == 7
    assert found[0].method == "cast"
    assert "text_sha256 abc" in found[0].harness
    assert found[3].method is None
    with pytest.raises(InputError, match="found: cast"):
        read_points([tmp_path / "runs"], method="ste")


def test_the_points_of_a_comparison_are_those_of_its_table(tmp_path):
    """Not its trials of learning rates, and not its one-shot rows, which train on no tokens."""
    for name, tokens in (("one-shot", 0), ("trial", 1000), ("best", 1000)):
        (tmp_path / f"a/runs/{name}/model").mkdir(parents=True)
        (tmp_path / f"a/runs/{name}/model/castlm.json").write_text(json.dumps(run_record(tokens, 9.0)))
    (tmp_path / "a/castlm-output.json").write_text('{"command": "compare"}')
    (tmp_path / "a/table.json").write_text(json.dumps({"results": [run_record(1000, 5.5)]}))
    (tmp_path / "b/model").mkdir(parents=True)
    (tmp_path / "b/model/castlm.json").write_text(json.dumps(run_record(2000, 5.2)))
    (tmp_path / "b/table.json").write_text("{}")  # somebody's
    assert [(p.tokens, p.perplexity) for p in read_points([tmp_path])] == [(2000, 5.2), (1000, 5.5)]
    assert [p.perplexity for p in read_points([tmp_path / "a"])] == [5.5]
    (tmp_path / "a/table.json").write_text(json.dumps({"results": []}))
    with pytest.raises(InputError, match="no points"):
        read_points([tmp_path / "a"])


def test_dense_control_has_the_perplexity_it_trained_to(tmp_path):
    record = {**run_record(1000, None), "method": "dense", "perplexity": {"dense": 3.0, "trained": 2.9}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert read_points([tmp_path / "r.json"])[0].perplexity == 2.9


def test_runs_that_diverged_are_left_out_by_name(tmp_path, capsys):
    records = [{**run_record(1000 * 4**i, 8.0 - i), "verdict": {"ok": True, "reason": ""}} for i in range(4)]
    records[1]["verdict"] = {"ok": False, "problem": "DIVERGED", "reason": "perplexity 7.000, ABOVE the start"}
    records[2]["verdict"] = {"ok": False, "problem": "FELL SHORT", "reason": "perplexity 6.000, far from dense"}
    (tmp_path / "r.json").write_text(json.dumps(records))
    assert [p.perplexity for p in read_points([tmp_path / "r.json"])] == [8.0, 6.0, 5.0]
    said = capsys.readouterr().err
    assert re.search(rf"{tmp_path}/r\.json, result 2 .*diverged.* 7\.000", said)
    assert said.count("\n") == 1
    (tmp_path / "r.json").write_text(json.dumps(records[1:2]))
    with pytest.raises(InputError, match="no points"):
        read_points([tmp_path / "r.json"])


def test_a_run_in_two_files_is_refused(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps([run_record(1000, 5.0), {**run_record(2000, 4.0), "run_id": "a"}]))
    (tmp_path / "copy.json").write_text(json.dumps({**run_record(2000, 4.0), "run_id": "a"}))
    with pytest.raises(InputError, match=r"copy.json .*table.json, result 2"):
        read_points([tmp_path / "table.json", tmp_path / "copy.json"])


@pytest.mark.parametrize(
    ("base_model", "dense", "is_refused"),
    [
        ("one", 3.001, False),
        ("elsewhere/one", 3.0, False),
        ("other", 3.1, True),
        ("other", None, True),
        ("one", 3.5, True),  # the folder has changed
    ],
)
def test_a_law_holds_for_one_base_model(base_model, dense, is_refused):
    runs = [replace(p, base_model="one", dense=3.0, source="a") for p in points(SEVEN)]
    runs[3] = replace(runs[3], base_model=base_model, dense=dense, source="b")
    if is_refused:
        with pytest.raises(InputError, match=r"a is a run of one .*, and b of "):
            fit_law(runs, num_draws=5)
    else:
        assert fit_law(runs, num_draws=5, leave_largest_out=False).num_points == 7


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "", "no points"),
        ("a.csv", "tokens,ppl\n1,2\n", "line 2: perplexity is missing"),
        ("a.csv", "tokens,perplexity,tokens \n1000,5,2000\n", "the column tokens twice"),
        ("a.csv", "tokens,perplexity\n1000,5\n2000\n", "line 3: its number of cells"),
        ("a.csv", "tokens,perplexity\n1000,5,32\n", "line 2: its number of cells"),
        ("a.csv", "tokens,perplexity\n1000,five\n", "line 2: perplexity = 'five'"),
        ("a.csv", "tokens,perplexity\n1000,nan\n", "line 2: perplexity = 'nan'"),
        ("a.csv", "tokens,perplexity\n1000,\n", "line 2: perplexity is missing"),
        ("a.json", "{", "is not readable JSON: Expecting property name enclosed in double quotes: line 1"),
        ("a.json", '[{"tokens": 5, "perplexity": 5}, {"tokens": 5}]', "result 2: perplexity is missing"),
        ("a.json", "3", "list of results"),
        ("a.txt", "x", "a.txt"),
        (None, "", "missing"),
        ("run/metrics.jsonl", "", "no points"),
        ("run/other", "", "no points"),
    ],
)
def test_unreadable_points_name_the_file_and_line(tmp_path, name, content, reason):
    path = tmp_path / (name or "missing")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InputError) as error:
        read_points([path.parent if "run/" in (name or "") else path])
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value) or reason == "no points"
