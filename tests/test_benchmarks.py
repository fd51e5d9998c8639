"""The cheapest rows of `python -m benchmarks`, without thresholds: that they run and say what they measured."""

import json
import subprocess
import sys

import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks.masks import apex_mask, topk_mask
from benchmarks.rows import Row, interleaved, ratio_row

from castlm.core.masks import nm_mask


def test_the_cheapest_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    benchmarks.main(["--quick", "--only", "state", "--threads", "1", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["part"] == "AdamS state"
    assert 1 < row["value"] < 1 + 1 / 32
    assert row["met"] is True
    assert "AdamS state" in capsys.readouterr().out


def test_a_ratio_is_taken_round_by_round():
    row = ratio_row("part", "other", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0], "<= 1.25")
    assert (row.value, row.low, row.high, row.met) == (1.0, 0.5, 2.0, True)
    row = ratio_row("part", "other", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0], ">= 8")
    assert (row.value, row.low, row.high, row.met) == (1.0, 0.5, 2.0, False)
    assert Row("part", "other", 1.0, 1.0, 1.0).met is None


def test_contestants_take_turns():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 2, "b": 2}


def test_rivals_make_the_same_masks():
    weight = torch.randn(8, 16)
    assert torch.equal(topk_mask(weight), nm_mask(weight))
    assert torch.equal(apex_mask(weight).bool(), nm_mask(weight))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_none():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "benchmarks.gpu: torch sees no CUDA device; run it on a machine with one"
