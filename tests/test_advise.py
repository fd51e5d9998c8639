"""The advisor: its shapes, its roofline against published measurements, and its verdicts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import advisor

from castlm.cli.main import main
from castlm.devices import DEVICES, find_device
from castlm.export.packed import pack_folder
from castlm.files.stored import read_header
from castlm.formats.packed_file import FILE
from castlm.formats.table import FORMATS
from castlm.lab.advice import cpu as advise_module
from castlm.lab.advice.cpu import (
    Option,
    Quality,
    Ranked,
    Ranking,
    Shapes,
    layer_shapes,
    num_bytes,
    options,
    rank,
    shapes_of,
)
from castlm.lab.advice.roofline import advise
from castlm.lab.compare import tradeoff
from castlm.lab.compare.tradeoff import Candidate, as_dict, decode, text
from castlm.lab.planning.fit import fit_law
from castlm.lab.planning.law import predict_perplexity
from castlm.lab.planning.points import Point
from castlm.patterns import parse_pattern
from tests.packed_weights import needs_kernels
from tests.refusals import assert_refused
from tests.runs import edit_json, prune_to
from tests.tiny import save_tiny, tiny_model

LLAMA_1B = Shapes({(2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16}, (128256, 2048))
LLAMA_7B = Shapes({(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}, (32000, 4096))


def test_shapes_come_from_the_config_alone(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama")
    expected = Shapes({(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}, (264, 32), 0, False, 5 * 32)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert layer_shapes(tiny_model("llama")) == shapes_of(str(folder)) == expected
    gpt2 = shapes_of(str(save_tiny(tmp_path / "gpt2", "gpt2")))
    assert gpt2.blocks == {(96, 32): 2, (32, 32): 2, (64, 32): 2, (32, 64): 2}  # its Conv1D count as linear
    experts = shapes_of(str(save_tiny(tmp_path / "experts", "qwen3_moe")))
    assert experts.num_untimed > 0
    assert f"{experts.num_untimed:,} weights of the experts" in advise(experts, DEVICES["h100"], tokens=1).text()


def test_the_roofline_is_right_on_nine_of_ten_published_cells():
    row = advisor.published_row()
    assert row.met, row.value


def test_it_advises_2_4_where_a_7b_model_reads_a_prompt_and_not_where_a_1b_model_decodes_on_an_h100():
    advice = advise(LLAMA_7B, find_device("h100"), tokens=4096)
    assert 1.3 < advice.speedup("2:4 bf16") < 2
    assert advice.verdict.startswith("Use 2:4")
    for device in ("h100", "h100-pcie"):
        for tokens in (1, 64):
            advice = advise(LLAMA_1B, find_device(device), tokens=tokens)
            assert advice.speedup("2:4 bf16") < 0.8
            assert advice.verdict.startswith("Do not use 2:4 for speed")
            assert advice.mixed_speedup >= 1


def test_measured_seconds_decide_when_given_and_a_width_that_does_not_divide_by_4_stays_dense():
    def seconds(form, shape, tokens):
        return 0.5 if form.sparse and shape == (4096, 4096) else 1.0

    advice = advise(LLAMA_7B, find_device("h100"), tokens=1, seconds=seconds)
    best = {(4096, 4096): "2:4 bf16", (11008, 4096): "bf16", (4096, 11008): "bf16"}
    assert {row.shape: row.best for row in advice.rows} == best
    assert advice.is_measured
    assert advice.mixed_speedup == pytest.approx(225 / 161)
    advice = advise(Shapes({(64, 30): 1}), find_device("h100"), tokens=1, seconds=lambda form, shape, tokens: form.bits)
    assert advice.rows[0].best == "bf16"
    assert advice.rows[0].seconds["2:4 bf16"] == advice.rows[0].seconds["bf16"]


def test_the_command_prints_the_table_the_verdict_and_its_sources_and_writes_json(llama, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert main(["advise", llama, "--device", "h100", "--tokens", "1", "--json", str(file)]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    for part in ("64 x 32", "arXiv 2603.05232", "data sheet", report["verdict"]):
        assert part in printed
    assert report["verdict"].startswith("Do not use 2:4 for speed at 1 token on h100")
    assert (report["device"], report["speedup"]["bf16"]) == ("h100", 1)
    assert {row["device"] for row in report["evidence"]} == {"h100-pcie"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--device", "tpu"], "'tpu'"),
        (["--device", "a100", "--dtype", "fp8"], "a100 has no fp8"),
        (["--device", "a100", "--pattern", "4:8"], "2:4"),
        (["--device", "h100", "--dtype", "fp32"], "h100 has no fp32"),
        pytest.param(["--device", "this", "--dtype", "int8"], "fp32, bf16, fp16", marks=needs_kernels),
        (["--tokens", "-1"], "--tokens = -1"),
    ],
)
def test_the_command_complains_in_one_line(llama, capsys, options, named):
    assert_refused([(["advise", llama, *options], named)], capsys)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(advise_module, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(advise_module, "SECONDS", 0.0)
    monkeypatch.setattr(advise_module.rank, "__kwdefaults__", advise_module.rank.__kwdefaults__ | {"seconds": 0.0})


@needs_kernels
def test_on_a_cpu_every_format_is_timed_for_one_token_a_batch_and_a_prompt(quick, tmp_path, capsys):
    folder = save_tiny(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    edit_json(folder / "castlm.json", pattern="2:4", perplexity={"dense": 12.5, "pruned": 14.25}, proof={})
    assert main(["advise", str(folder), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "a.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert {
        f"{kind} {values}"
        for kind in ("dense", "2:4")
        for values in ("bf16", "int8, int8 head", "int4, int8 head", "int3, int8 head")
    } <= set(names)
    for row in report["rows"]:
        assert set(row["seconds"]) == set(advise_module.WORKLOADS)
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["name"] in printed.out
    assert report["verdict"] in printed.out
    assert "a perplexity of 14.25 before rounding, against 12.50 of the dense model" in report["verdict"]
    assert "measured by its run" in printed.out


@needs_kernels
def test_the_law_predicts_the_perplexity_of_n_m(quick, llama, tmp_path, capsys):
    points = [Point(tokens=tokens, perplexity=math.exp(2 + 30 * tokens**-0.3)) for tokens in (1e4, 3e4, 1e5, 1e6)]
    law = fit_law(points)
    (tmp_path / "law.json").write_text(json.dumps(law.as_dict()))
    report = tmp_path / "a.json"
    by_law = ["advise", llama, "--law", str(tmp_path / "law.json")]
    assert main([*by_law, "--train-tokens", "5e5", "--json", str(report)]) == 0
    expected = predict_perplexity(law, 5e5).perplexity
    rows = {row["name"]: row["perplexity"] for row in json.loads(report.read_text())["rows"]}
    assert rows["2:4 bf16"] == expected
    assert rows["dense bf16"] is None
    assert "for 5e+05 training tokens" in capsys.readouterr().out
    assert main(by_law) == 2
    edit_json(tmp_path / "law.json", runs_of={"pattern": "1:4"})
    assert main([*by_law, "--train-tokens", "5e5"]) == 2
    assert "the law of 1:4" in capsys.readouterr().err


@needs_kernels
def test_bytes_are_those_of_the_packed_files(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    shapes = shapes_of(str(folder))
    for head in (None, "int8"):
        pack_folder(folder, tmp_path / f"p{head}", None, head=head)
        stored = read_header(tmp_path / f"p{head}" / FILE).values()
        option = Option("bf16", head=head or "bf16")
        assert num_bytes(option, shapes, "bf16") == sum(tensor.num_bytes for tensor in stored)


def made_up(**speeds):
    """A ranking in which an option takes 1 / speed seconds; dense bf16 has the speed 1."""
    rows = []
    for option in options("bf16"):
        first, *others = speeds.get(option.name.replace(" ", "_").replace(":", "of").replace(",", ""), (1, 1, 1))
        seconds = {name: 1 / s for name, s in zip(advise_module.WORKLOADS, (first, *others))}
        rows.append(Ranked(option, seconds, int(1e6 * FORMATS[option.values].bits)))
    return Ranking("made up", "bf16", rows)


def test_the_verdict_names_dense_int4_for_one_sequence_and_2_4_where_products_count():
    found = made_up(dense_int4_int8_head=(2.1, 1, 0.9), **{"2of4_int8_int8_head": (1.5, 2.75, 1.3)})
    assert found.verdict.startswith("For one token, use dense int4, int8 head: it is 2.10 times as fast as dense bf16")
    assert "for a prompt of 512, 2:4 int8, int8 head is 1.30 times as fast as dense" in found.verdict
    assert "at equal bytes dense int4" in found.verdict
    known = replace(found, quality=Quality(sparse=19.5))
    assert "with a perplexity of 19.50 before rounding" in known.verdict
    assert "a perplexity of 19.50 is good enough" in known.verdict
    smaller = made_up(dense_int3_int8_head=(2.1, 1, 1), dense_int4_int8_head=(2.1, 1, 1))
    assert smaller.verdict.startswith("For one token, use dense int4")  # int3 needs training
    slow = made_up(**{"2of4_int8_int8_head": (0.5, 0.5, 0.5)})
    assert "it does not pay" in slow.verdict


@needs_kernels
def test_layers_that_the_pattern_does_not_fit_count_as_dense(quick):
    ranking = rank(Shapes({(64, 30): 2}), dtype="fp32", workloads={"one token": 1}, seconds=0.0)
    seconds = {row.option.name: row.seconds["one token"] for row in ranking.rows}
    assert seconds["2:4 fp32"] == seconds["dense fp32"]


# ---- advise --results: finished results against each other


DENSE, SPARSE, CHANNELS, POOR = (
    {"name": name, "pattern": pattern, "perplexity": ppl, "num_bytes": size, "tokens_per_second": speed}
    for name, pattern, ppl, size, speed in [
        ("dense", "dense", 6.0, 100, 10.0),
        ("sparse", "2:4", 8.0, 60, 15.0),
        ("channels", "channels:0.5", 8.04, 70, 14.0),
        ("poor", "channels:0.75+2:4", 9.0, 50, 13.0),
    ]
)


@pytest.fixture
def dense(tmp_path):
    return save_tiny(tmp_path / "dense", "llama", hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture
def result(dense, tmp_path):
    """Makes a folder as `castlm train` leaves it, of a pattern and perplexity."""

    def made(name, pattern, perplexity, dense_perplexity=6.0, **measured):
        model = prune_to(tmp_path / name / "model", dense, pattern=pattern)
        text = {"text_sha256": "ab", "num_tokens": 100, "seq_len": 32, "stride": 32} | measured
        figures = {"dense": dense_perplexity, "pruned": perplexity}
        edit_json(Path(model) / "castlm.json", perplexity=figures, measured=text)
        return tmp_path / name

    return made


def test_the_table_is_sorted_and_names_what_to_use():
    report = as_dict([POOR, CHANNELS, SPARSE, DENSE])
    assert [row["name"] for row in report["results"]] == ["dense", "sparse", "channels", "poor"]
    lines = {line.split()[0]: line.partition("x  ")[2].strip() for line in text(report).splitlines()[1:]}
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
        sizes[pattern], speeds = decode(Candidate("r", folder, parse_pattern(pattern), 8.0))
        assert len(speeds) == tradeoff.REPEATS
        assert min(speeds) > 0
    whole, _ = decode(Candidate("dense", str(dense), None, 6.0))
    assert sizes["channels:0.5+2:4"] < sizes["channels:0.5"] < whole
    assert sizes["2:4"] < whole


@needs_kernels
def test_the_command_measures_runs_and_writes_json(dense, result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tradeoff, "ROUNDS", 1)
    monkeypatch.setattr(tradeoff, "in_own_process", lambda function, *args: function(*args))
    runs = [str(result("sparse", "2:4", 8.0)), str(result("runs/dense", "channels:0.5", 9.0, 6.01))]
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


@needs_kernels
def test_what_does_not_compare_is_refused_in_one_line(dense, result, tmp_path, capsys):
    run, other = str(result("run", "2:4", 8.0)), str(result("other", "2:4", 8.0, seq_len=64))
    of_another = str(result("of-another", "2:4", 8.0, 7.0))
    (tmp_path / "empty").mkdir()
    cases = [
        (["--results", run, of_another], "of perplexity 7, not 6"),
        (["--results", run, other], "seq_len 64, not 32"),
        (["--results", str(tmp_path / "empty")], "castlm.json"),
        (["--results", str(dense)], "castlm.json"),
        (["--results", run, "--device", "h100"], "--device"),
    ]
    assert_refused([(["advise", str(dense), *arguments], named) for arguments, named in cases], capsys)
