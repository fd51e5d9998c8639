"""Files of an earlier day are read as they were written, and the defaults are as good as they were: see make_golden."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from castlm.facts import Facts
from tests import make_golden
from tests.make_golden import FORMATS, GOLDEN, castlm, logits_of

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A copy of the golden files, as the working folder."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_folder_computes_what_it_computed(name):
    expected = load_file(GOLDEN / "logits.safetensors")[name]
    found = logits_of(GOLDEN / "packed" / name)
    off = (found - expected).abs().max().item() / expected.std().item()
    assert off < (0.05 if "int" in name else 1e-3), (
        off
    )  # activations before integers are rounded: sums in another order


@pytest.mark.parametrize("name", [name for name, (pattern, _) in FORMATS.items() if pattern != "1:1"])
def test_a_packed_folder_is_verified_in_its_own_pattern(name, capsys):
    castlm("verify", GOLDEN / "packed" / name)
    assert f"{FORMATS[name][0]} holds" in capsys.readouterr().out


def test_a_packed_folder_is_verified_in_a_fresh_process():
    """In which nothing has registered castlm's format with transformers."""
    command = [sys.executable, "-m", "castlm", "verify", str(GOLDEN / "packed" / "2of4-bf16")]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def test_a_packed_folder_is_unpacked_to_the_weights_of_the_model(golden):
    castlm("unpack", "packed/dense-bf16", "--output-dir", "plain")
    found, expected = (load_file(f"{folder}/model.safetensors") for folder in ("plain", "model"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_record_of_a_run_is_read_and_written_as_it_was():
    stored = json.loads((GOLDEN / "castlm.json").read_text())
    facts = Facts.from_json(stored, "castlm.json")
    assert facts.to_json() == stored
    assert facts.perplexity.final == EXPECTED["trained"]


def test_a_stopped_run_is_resumed_to_its_end(golden):
    saved = sum('"loss"' in line for line in (golden / "run" / "metrics.jsonl").read_text().splitlines())
    castlm("train", "--config", "run/config.yaml", "--resume")
    rows = [json.loads(line) for line in (golden / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert saved < 12
    castlm("verify", "run")


def test_the_default_is_as_good_as_it_was(golden, tmp_path, users_effort):
    """5 % of perplexity more than before fails. A default that got better: write the golden files again."""
    found = make_golden.quality(tmp_path / "run")
    assert found["dense"] == pytest.approx(EXPECTED["dense"], rel=0.01)
    for name in ("start", "trained"):
        assert math.log(found[name] / EXPECTED[name]) < 0.05, (name, found, EXPECTED)


def test_the_golden_files_are_small():
    assert sum(file.stat().st_size for file in (GOLDEN / "model").iterdir()) < 1 << 20
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 3 << 20
