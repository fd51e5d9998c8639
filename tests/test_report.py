"""castlm report: the page of a run, finished or not, its charts, and its look in a browser."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from castlm.cli.main import main
from castlm.cli.report import write_report
from castlm.core.errors import InputError
from castlm.facts import Perplexities, to_json
from castlm.lab.report import charts
from castlm.lab.report.charts import Picture, Series, heat_map, line_chart
from castlm.lab.report.run_page import read_run, run_page
from castlm.lab.report.sample import read_sample
from castlm.training.verdict import verdict
from tests.runs import edit_json, record_of, small_command
from tests.slow import slow
from tests.tiny import TEXT


@pytest.fixture(scope="module")
def finished(llama, text, tmp_path_factory) -> Path:
    """A run of `castlm train` of eight steps, with its page."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"eval_steps": 2, "per_device_train_batch_size": 2, "eval_tokens": 512, "decay_end": 0.5, "device": "cpu"}
    command = small_command("train", llama, text, folder / "run", **sizes)
    assert main(command) in (0, 1)
    return folder / "run"


def test_train_writes_a_page_that_fetches_nothing(finished):
    page = (finished / "report.html").read_text()
    record = record_of(finished / "model")
    assert f"{record['perplexity']['pruned']:,.3f}" in page
    for heading in ("Perplexity", "Training loss", "Error by layer"):
        assert f"<h3>{heading}</h3>" in page
    assert page.count("<figure>") in (0, 2)  # a chart of half a page has another beside it
    assert not re.search(r'(src|href)="(?!#)', page)  # a # is a place in the page itself
    assert not re.search(r"url\((?!#)", page)
    assert 'http-equiv="refresh"' not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_finished_run_names_the_size_of_its_checkpoints(finished, capsys, monkeypatch):
    (finished / "checkpoints").mkdir(exist_ok=True)
    (finished / "checkpoints" / "one").write_bytes(b"0")
    again = ["train", "--config", str(finished / "config.yaml"), "--resume", "--no-report"]
    main(again)
    assert "rm -r" not in capsys.readouterr().err  # they are small
    monkeypatch.setattr("castlm.cli.train._LARGE_CHECKPOINTS", 1)
    main(again)
    assert f"rm -r {finished / 'checkpoints'}" in capsys.readouterr().err


def test_the_page_has_a_sample_of_both_models(finished):
    sample = json.loads((finished / "sample.json").read_text())
    figures = record_of(finished / "model")["perplexity"]
    named = [f"Dense model, perplexity {figures['dense']:.2f}", f"After cast, perplexity {figures['pruned']:.2f}"]
    assert [model["name"] for model in sample["models"]] == named
    assert all(model["answer"] != model["completion"] for model in sample["models"])
    assert f"{sample['question']} </span>" in (finished / "report.html").read_text()
    assert sample["prompt"] == TEXT[: len(sample["prompt"])]
    assert sample["prompt"].split("\n")[0] in (finished / "report.html").read_text()


def test_evaluations_hold_the_histogram_of_masked_weights(finished):
    run = read_run(finished)
    rows = [row["masked_histogram"] for row in run.evaluations]
    assert len(rows) == 5
    assert len({sum(row) for row in rows}) == 1
    whole = sum(rows[-1])
    assert rows[0][0] == rows[-1][0] == whole  # all are zero at first and at the end
    assert rows[1][0] < whole  # and grow in between
    assert set(run.evaluations[0]["masked_share"]) == set(run.facts.start.layer_errors)
    assert not any(run.evaluations[0]["masked_share"].values())


@pytest.fixture
def running(finished, tmp_path) -> Path:
    """The run as it was before its last step."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    rows = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:-3]))
    return folder


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_a_running_run_says_how_far_it_is(running):
    assert main(["report", str(running)]) == 0
    page = (running / "report.html").read_text()
    assert re.search(r"Step \d of 8\. So far: ", page)
    assert 'class="bar"' in page
    assert "<h2>A sample of text</h2>" not in page
    assert main(["report", str(running), "--sample", "yes"]) == 2


@pytest.mark.parametrize("upto", [slow("the last evaluation"), "all"])
def test_a_page_of_a_run_that_diverged(upto, running):
    """metrics.jsonl has null where a perplexity is not finite."""
    rows = [json.loads(line) for line in (running / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "perplexity" in row]
    for row in measured if upto == "all" else measured[-1:]:
        row |= {"perplexity": None, "prune_now_ppl": None, "sparse_weight_ratio": None}
    (running / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(running)]) == 0
    page = (running / "report.html").read_text()
    assert "Training loss" in page
    assert "nan" not in page.lower().split("</style>")[-1]


@pytest.mark.parametrize("figure", ['"step": "a"', '"step": null', '"perplexity": "x"', '"tokens": [1]'])
def test_a_figure_that_is_no_number_is_named_with_its_line(running, figure, capsys):
    with (running / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 9, {figure}}}\n{{"step": 10}}\n')
    assert main(["report", str(running)]) == 2
    assert "is not a row" in capsys.readouterr().err


def test_the_sample_of_another_run_is_not_shown(running, finished):
    shutil.copytree(finished / "model", running / "model")
    shutil.copy(finished / "sample.json", running)
    assert read_sample(read_run(running)) is not None
    record = record_of(running / "model")
    (running / "model" / "castlm.json").write_text(json.dumps(record | {"run_id": "another"}))
    assert read_sample(read_run(running)) is None


@pytest.mark.usefixtures("no_charts")
def test_watching_ends_with_the_run(running, finished, monkeypatch):
    pages = []

    def finish_meanwhile(seconds):
        pages.append((running / "report.html").read_text())
        shutil.copytree(finished / "model", running / "model")
        shutil.copy(finished / "sample.json", running)

    monkeypatch.setattr("time.sleep", finish_meanwhile)
    assert main(["report", str(running), "--watch"]) == 0
    assert len(pages) == 1
    assert 'http-equiv="refresh"' in pages[0]
    last = (running / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last
    assert "<h2>A sample of text</h2>" in last


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("one_shot", "pruned", "badge", "word"),
    [(50.0, 3.0, "good", "done"), (50.0, 9.4, "bad", "fell short"), (5.0, 50.0, "bad", "diverged")],
)
def test_the_badge_tells_how_the_result_is(one_shot, pruned, badge, word, running, finished):
    shutil.copytree(finished / "model", running / "model")
    file = running / "model" / "castlm.json"
    record = json.loads(file.read_text())
    perplexity = Perplexities(dense=2.0, one_shot=one_shot, before_prune=pruned, pruned=pruned)
    found = {"perplexity": to_json(perplexity), "verdict": to_json(verdict(perplexity))}
    file.write_text(json.dumps(record | found))
    page = run_page(read_run(running))
    assert f'<span class="badge {badge}">{word}</span>' in page
    assert ("ABOVE the one-shot start (5.000)" in page) == (word == "diverged")


@pytest.mark.usefixtures("no_charts")
def test_a_page_that_castlm_did_not_write_is_not_replaced(running, tmp_path):
    (tmp_path / "mine.txt").write_text("my own page")
    page = running / "report.html"
    page.unlink(missing_ok=True)
    page.symlink_to(tmp_path / "mine.txt")
    with pytest.raises(InputError, match=r"report\.html"):
        write_report(running)
    assert (tmp_path / "mine.txt").read_text() == "my own page"
    page.unlink()
    write_report(running)
    write_report(running)  # its own page is replaced


def test_a_run_in_a_folder_that_cannot_be_written_is_refused_before_text_is_sampled(finished, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["report", str(finished), "--sample", "yes"]) == 2
    assert f"{finished} cannot be written: change its permissions, or copy the run" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run: give the output_dir"):
        write_report(tmp_path)


def test_a_record_whose_size_is_no_number_is_refused(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    edit_json(run / "model" / "castlm.json", num_params="x")
    with pytest.raises(InputError, match=r"castlm\.json: num_params is 'x', not a whole number"):
        write_report(run)


def test_text_in_charts_is_escaped():
    name = "<b>&"
    charts = [
        line_chart([Series(name, [(0, 1), (1, 2)], marks=True)], x_label=name, y_label=name, levels={name: 1.5}),
        heat_map([[0.5, None]], [name], [name, ""], x_label=name, y_label=name),
    ]
    for chart in charts:
        root = ElementTree.fromstring(chart.encode())
        assert name in "".join(root.itertext())
        ElementTree.fromstring(Picture("", chart, "").inline)


@pytest.mark.usefixtures("no_charts")
def test_without_matplotlib_the_page_has_its_figures_and_names_the_remedy(finished):
    page = run_page(read_run(finished))
    assert charts.NEEDS_MATPLOTLIB.replace("'", "&#39;") in page
    assert "<svg" not in page
    assert "dense model" in page


POOR = {"dense": 5.0, "before_prune": 75.0, "pruned": 75.0}
"""A run without a sparse start, which has diverged if it rose, and not if it is merely poor."""


@pytest.mark.parametrize(
    ("figures", "earlier", "problem"),
    [
        ({"dense": 6.0, "one_shot": 14.0, "pruned": 8.0}, [], None),
        ({"dense": 6.0, "one_shot": 14.0, "pruned": 14.1}, [], "DIVERGED"),
        ({"dense": 6.0, "one_shot": 90.0, "pruned": 61.0}, [], "FELL SHORT"),
        ({"dense": 5.0, "one_shot": 60.0, "pruned": 10.1}, [], "FELL SHORT"),
        ({"dense": 5.0, "one_shot": 60.0, "pruned": 10.0}, [], None),
        ({"dense": 6.0, "trained": 11.9}, [], None),
        ({"dense": 5.0, "before_prune": 75.0, "trained": 75.0}, [], "DIVERGED"),  # the dense control
        ({"dense": 6.0, "pruned": math.nan}, [], "DIVERGED"),
        *((POOR, earlier, "FELL SHORT") for earlier in ([], [90.0, 80.0], [60.0, math.inf])),
        (POOR, [90.0, 30.0], "DIVERGED"),
        (POOR | {"before_prune": math.nan, "pruned": math.nan}, [30.0], "DIVERGED"),
    ],
)
def test_a_run_has_diverged_only_if_it_ended_above_its_start(figures, earlier, problem):
    found = verdict(Perplexities(**figures), earlier)
    assert (found.ok, found.problem) == (problem is None, problem)
