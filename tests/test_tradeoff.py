"""Finished results against each other: equal perplexity, the measured columns, and records that do not fit together."""

import json

import pytest

from castlm.cli.main import main
from castlm.compare import tradeoff
from castlm.compare.tradeoff import Candidate, Measured, as_dict, at_equal_perplexity, candidates, decode, text
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export.hf import export_model
from castlm.inference import native
from castlm.models.io import load_model
from castlm.patterns import parse_pattern
from tests.tiny import save_tiny

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="the C++ kernels are not built")

DENSE = Measured("dense", "dense", 6.0, 100, 10.0)
SPARSE = Measured("sparse", "2:4", 8.0, 60, 15.0)
CHANNELS = Measured("channels", "channels:0.5", 8.04, 70, 14.0)
POOR = Measured("poor", "channels:0.75+2:4", 9.0, 50, 13.0)


@pytest.fixture
def dense(tmp_path):
    return save_tiny(tmp_path / "dense", "llama", hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture
def result(dense, tmp_path):
    """Makes a folder as `castlm train` leaves it, of a pattern and perplexity."""

    def made(name, pattern, perplexity, **measured):
        loaded, kind = load_model(str(dense)), parse_pattern(pattern)
        _, left_dense = sparse_linears(loaded.model, kind)
        prune_(loaded.model, kind)
        figures = {"dense": 6.0, "pruned": perplexity}
        text = {"text_sha256": "ab", "num_tokens": 100, "seq_len": 32, "stride": 32} | measured
        record = {"perplexity": figures, "measured": text}
        folder = tmp_path / name / "model"
        export_model(loaded.model, loaded.tokenizer, folder, pattern=kind, left_dense=left_dense, record=record)
        return folder.parent

    return made


def test_equal_perplexity_is_within_a_percent():
    assert at_equal_perplexity([DENSE, CHANNELS], DENSE) == (DENSE, DENSE)
    assert at_equal_perplexity([DENSE, SPARSE, CHANNELS, POOR], SPARSE) == (SPARSE, SPARSE)
    assert at_equal_perplexity([SPARSE, POOR], POOR) == (SPARSE, POOR)


def test_the_table_is_sorted_and_names_what_to_use():
    report = as_dict([POOR, CHANNELS, SPARSE, DENSE])
    assert [row["name"] for row in report["results"]] == ["dense", "sparse", "channels", "poor"]
    lines = {line.split()[0]: line.partition("x  ")[2] for line in text(report).splitlines()[1:]}
    assert lines == {
        "dense": "yes, the fastest and smallest at this perplexity",
        "sparse": "yes, the fastest and smallest at this perplexity",
        "channels": "no, use sparse",
        "poor": "yes, the smallest at this perplexity",
    }


@needs_kernels
def test_zeros_are_left_out_of_the_bytes_and_cut_channels_are_not_there(dense, result):
    sizes = {}
    for pattern in ("2:4", "channels:0.5", "channels:0.5+2:4"):
        folder = str(result(pattern.replace(":", "_"), pattern, 8.0) / "model")
        sizes[pattern], speeds = decode(Candidate("r", folder, pattern, 8.0))
        assert len(speeds) == tradeoff.REPEATS
        assert min(speeds) > 0
    whole, _ = decode(Candidate("dense", str(dense), None, 6.0))
    assert sizes["channels:0.5+2:4"] < sizes["channels:0.5"] < whole
    assert sizes["2:4"] < whole


@needs_kernels
def test_the_command_measures_runs_and_writes_json(dense, result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tradeoff, "ROUNDS", 1)
    monkeypatch.setattr(tradeoff, "in_own_process", lambda function, *args: function(*args))
    runs = [str(result("sparse", "2:4", 8.0)), str(result("runs/dense", "channels:0.5", 9.0))]
    out = tmp_path / "out.json"
    assert main(["advise", str(dense), "--results", *runs, "--json", str(out)]) == 0
    assert "at this perplexity" in capsys.readouterr().out
    rows = json.loads(out.read_text())["results"]
    assert [(row["name"], row["pattern"]) for row in rows] == [
        ("dense", "dense"),
        ("sparse", "2:4"),
        (runs[1], "channels:0.5"),  # by its folder: one row is called dense
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_results_of_another_dense_model_are_refused(tmp_path):
    def candidate(name, dense):
        (tmp_path / name).mkdir()
        record = {"base_model": "an/id", "perplexity": {"dense": dense, "pruned": 8.0}, "measured": {}}
        (tmp_path / name / "castlm.json").write_text(json.dumps(record))
        return str(tmp_path / name)

    one, same, other = candidate("one", 6.0), candidate("same", 6.01), candidate("other", 7.0)
    assert [c.perplexity for c in candidates("an/id", [one, same])] == [6.0, 8.0, 8.0]
    with pytest.raises(InputError, match=r"perplexity 7.* 6"):
        candidates("an/id", [one, other])


@needs_kernels
def test_what_does_not_compare_is_refused_in_one_line(dense, result, tmp_path, capsys):
    run = str(result("run", "2:4", 8.0))
    other = str(result("other", "2:4", 8.0, seq_len=64))
    (tmp_path / "empty").mkdir()
    for options, complaint in (
        (["--results", run, str(other)], "has seq_len 64, not 32: compare results of one model, text and context"),
        (["--results", str(tmp_path / "empty")], "no castlm.json"),
        (["--results", str(dense)], "no castlm.json"),
        (["--results", run, "--device", "h100"], "--device is not for --results"),
    ):
        capsys.readouterr()
        assert main(["advise", str(dense), *options]) == 2
        captured = capsys.readouterr()
        assert complaint in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
