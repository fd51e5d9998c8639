"""The facts of a model: castlm.json is read as it was written, and an entry of another name or type is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.facts import Facts, Perplexities, Start, Verdict, from_json, to_json
from tests.runs import CONDITIONS, PROOF, RUN, edit_json, prune_to, record_of
from tests.tiny import save_tiny


def test_what_is_written_is_read_again_with_null_for_a_figure_that_is_not_finite():
    facts = Facts.from_json(RUN, "here")
    assert facts.perplexity == Perplexities(dense=3.0, pruned=math.inf)
    assert (facts.perplexity.final, facts.verdict.outcome) == (math.inf, "diverged")
    assert facts.start.layer_errors == {"a.b": None, "c": 0.5}  # in a dict, null is no figure
    written = facts.to_json()
    assert Facts.from_json(written, "here") == facts
    # Entries that the run has not are left out; those with a number or an object of their own stay.
    assert written.keys() == RUN.keys()
    assert written["start"]["basis"] == RUN["start"]["basis"]
    assert from_json(Start, to_json(facts.start), "here") == facts.start


def test_an_empty_object_stands_for_none_and_a_quantized_run_has_lost_its_perplexity():
    quantized = {**RUN, "masked_histogram": {}, "calibration": {}, "quantized": {"kind": "int8"}}
    del quantized["perplexity"]
    facts = Facts.from_json(quantized, "here")
    assert (facts.masked_histogram, facts.calibration, facts.perplexity) == (None, None, Perplexities())
    assert Facts.from_json(facts.to_json(), "here") == facts


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trained_steps": 2}, "trained_steps is no entry"),
        ({"proof": {**PROOF, "group": 1}}, r"proof\.group is no entry"),
        ({"proof": {"layers": 1}}, r"proof\.bad_layers is missing"),
        ({"figures": [{**CONDITIONS, "name": "dense"}]}, r"figures\[0\]\.perplexity is missing"),
        ({"figures": {}}, "figures is {}, not a list"),
        ({"perplexity": [3.0]}, r"perplexity is \[3\.0\], not an object"),
        ({"perplexity": {"dense": "3"}}, r"perplexity\.dense is '3', not a number"),
        ({"num_params": 1e9}, "num_params is 1000000000.0, not a whole number"),
        ({"verdict": {"ok": 1, "reason": ""}}, r"verdict\.ok is 1, not true or false"),
        ({"left_dense": {"a": 1}}, r"left_dense\.a is 1, not a text"),
    ],
)
def test_an_entry_with_another_name_or_type_is_refused_by_name(change, named):
    with pytest.raises(InputError, match=f"^here: ({named})"):
        Facts.from_json({**RUN, **change}, "here")


def test_every_entry_that_runs_write_is_missed():
    for name in RUN.keys() - {"pattern", "left_dense", "proof", "start"}:
        others = {other: value for other, value in RUN.items() if other != name}
        with pytest.raises(InputError, match=f"here: {name} is missing"):
            Facts.from_json(others, "here")


@pytest.mark.parametrize("command", ["verify", "pack", "quantize", "advise", "finetune"])
def test_commands_name_the_file_and_the_entry(command, tmp_path, text, capsys):
    model = Path(prune_to(tmp_path / "model", save_tiny(tmp_path / "dense", "llama")))
    assert set(record_of(model)) >= {"schema_version", "pattern", "left_dense", "versions", "proof", "method"}
    edit_json(model / "castlm.json", perplexities={"dense": 3.0})
    rest = {
        "verify": [],
        "advise": [],
        "finetune": ["--dataset", text, "--output-dir", str(tmp_path / "out")],
    }
    arguments = rest.get(command, ["--output-dir", str(tmp_path / "out")])
    assert main([command, str(model), *arguments]) == 2
    assert f"{model / 'castlm.json'}: perplexities is no entry" in capsys.readouterr().err


def test_a_verdict_without_a_problem_is_of_a_run_that_diverged():
    assert Verdict(ok=False, reason="").outcome == "diverged"
    assert Verdict(ok=True, reason="").outcome is None
    assert dataclasses.replace(Verdict(ok=False, reason=""), problem="FELL SHORT").outcome == "fell short"
    json.dumps(Facts.from_json(RUN, "here").to_json())
