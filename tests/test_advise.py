"""The advisor: its shapes, its timing of the CPU and of a stub in place of a GPU, and its verdicts."""

import json
import math
import shlex
import shutil
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from benchmarks.render import RESULTS, ROOT

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.export.packed import pack_folder
from castlm.facts import Facts
from castlm.lab.advice import cpu as advise_module
from castlm.lab.advice import recipes as recipes_module
from castlm.lab.advice.cpu import (
    Load,
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
    time_layer,
)
from castlm.lab.advice.gpu import advise_on_gpu
from castlm.lab.advice.recipes import Recipe, choose, parse_option
from castlm.lab.planning.fit import fit_law
from castlm.lab.planning.points import Point
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import read_specs
from castlm_runtime.stored import PACKED_SINGLE as FILE
from castlm_runtime.stored import read_header
from tests.packed_weights import needs_kernels
from tests.refusals import assert_refused
from tests.runs import edit_json
from tests.stub_backend import StubBackend
from tests.test_models import write_gguf
from tests.tiny import save_tiny, tiny_model


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
    on_gpu = advise_on_gpu(experts, tokens=1, backend=StubBackend(lambda *of: 1.0))
    assert f"{experts.num_untimed:,} weights of the experts" in on_gpu.text()


NARROW, WIDE, ODD = (32, 64), (64, 64), (64, 30)
GPU_SHAPES = Shapes({WIDE: 3, NARROW: 2, ODD: 1}, (128, 64))


def test_on_a_gpu_each_shape_is_timed_dense_and_2_4_and_the_faster_one_is_advised():
    def seconds(way, shape, tokens):
        return 0.5 if way == "2:4" and shape == WIDE else 1.0

    backend = StubBackend(seconds)
    advice = advise_on_gpu(GPU_SHAPES, tokens=4, backend=backend)
    assert {row.shape: row.best for row in advice.rows} == {WIDE: "2:4", NARROW: "dense", ODD: "dense"}
    assert {tokens for _, tokens in backend.races} == {4}
    assert advice.speedup == advice.mixed_speedup == pytest.approx(7 / 5.5)  # 3 + 2 + 1 layers and the head
    assert all(words in advice.verdict for words in ("Use 2:4", "4 tokens", "1.27"))
    for part in ("64 x 64", "2.00x", advice.verdict):
        assert part in advice.text()
    assert advice.as_dict()["rows"][0] == {
        "shape": WIDE,
        "count": 3,
        "seconds": {"dense": 1.0, "2:4": 0.5},
        "best": "2:4",
    }


def test_the_verdict_on_a_gpu_is_no_where_2_4_is_slower_and_partly_where_it_wins_in_some_layers():
    def verdict(narrow, wide):
        ways = {NARROW: narrow, WIDE: wide}
        backend = StubBackend(lambda way, shape, tokens: ways.get(shape, 1.0) if way == "2:4" else 1.0)
        return advise_on_gpu(GPU_SHAPES, tokens=1, backend=backend).verdict

    assert "Do not use 2:4" in verdict(2.0, 2.0)
    assert "0.58" in verdict(2.0, 2.0)
    assert "1.00" in verdict(1.0, 1.0)
    assert all(speed in verdict(2.0, 0.5) for speed in ("1.27", "0.93"))


@pytest.mark.parametrize("failing", ["run", "search"])
def test_a_layer_whose_2_4_kernel_does_not_run_counts_as_dense(failing):
    backend = StubBackend(lambda way, *of: {"dense": 3.0, "2:4": 1.0}[way], failing=failing)
    advice = advise_on_gpu(GPU_SHAPES, tokens=4, backend=backend)
    assert all(row.seconds == {"dense": 3.0, "2:4": 3.0} for row in advice.rows)
    with pytest.raises(InputError, match="fp32"):
        advise_on_gpu(GPU_SHAPES, tokens=4, dtype="fp32", backend=backend)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--device", "tpu"], "'tpu'"),
        (["--dtype", "int8"], "'int8'"),
        (["--pattern", "blocks:4x4:0.5"], "blocks:4x4:0.5"),
        pytest.param(
            ["--device", "cuda"], "sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
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
    edit_json(folder / "castlm.json", pattern="2:4", perplexity={"dense": 12.5, "pruned": 14.25})
    assert main(["advise", str(folder), "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "a.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert {
        f"{kind} {values}"
        for kind in ("dense", "2:4")
        for values in ("bf16", "int8, int6 head", "int4, int6 head", "int3, int6 head")
    } <= set(names)
    for row in report["rows"]:
        assert set(row["seconds"]) == set(advise_module.WORKLOADS)
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["name"] in printed.out
    assert report["verdict"] in printed.out
    assert report["peers"] in printed.out
    assert {f"transformers, {values}" for values in ("fp32", "bf16")} & set(names)
    assert ("torch's dynamic int8" in names) == advise_module.has_dynamic_int8()
    assert all(perplexity in report["verdict"] for perplexity in ("14.25", "12.50"))
    assert "measured by its run" in printed.out


@needs_kernels
def test_a_gguf_file_has_a_row_with_its_bytes(quick, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    assert main(["advise", str(tmp_path / "tiny.gguf"), "--device", "cpu", "--tokens", "1"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("your file"))
    assert row.split()[-1] == f"{(tmp_path / 'tiny.gguf').stat().st_size / 1e6:,.1f}"


@needs_kernels
def test_the_law_predicts_the_perplexity_of_n_m(quick, llama, tmp_path, capsys):
    def true(tokens):
        return math.exp(2 + 30 * tokens**-0.3)

    law = fit_law([Point(tokens=tokens, perplexity=true(tokens)) for tokens in (1e4, 3e4, 1e5, 1e6)])
    (tmp_path / "law.json").write_text(json.dumps(law.as_dict()))
    report = tmp_path / "a.json"
    by_law = ["advise", llama, "--device", "cpu", "--law", str(tmp_path / "law.json")]
    assert main([*by_law, "--train-tokens", "5e5", "--json", str(report)]) == 0
    rows = {row["name"]: row["perplexity"] for row in json.loads(report.read_text())["rows"]}
    assert rows["2:4 bf16"] == pytest.approx(true(5e5), rel=1e-3)  # no point of the fit
    assert rows["dense bf16"] is None
    assert "for 5e+05 training tokens" in capsys.readouterr().out
    assert main(by_law) == 2
    edit_json(tmp_path / "law.json", runs_of={"pattern": "1:4"})
    assert main([*by_law, "--train-tokens", "5e5", "--pattern", "2:4"]) == 2
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
    found = made_up(dense_int4_int6_head=(2.1, 1, 0.9), **{"2of4_int8_int6_head": (1.5, 2.75, 1.3)})
    assert all(words in found.peers for words in ("2.10", "dense int4, int6 head", "2.75", "2:4 int8, int6 head"))
    assert all(words in found.verdict for words in ("dense int4, int6 head", "2.10", "2:4 int8, int6 head", "1.30"))
    known = replace(found, quality=Quality(sparse=19.5, pattern=NM(2, 4)))
    assert "19.50" in known.verdict
    smaller = made_up(dense_int3_int6_head=(2.1, 1, 1), dense_int4_int6_head=(2.1, 1, 1))
    assert "dense int4" in smaller.verdict
    assert "int3" not in smaller.verdict.partition(".")[0]  # int3 needs training
    wide = replace(found, rows=[*found.rows, replace(found.best(True, "batch of 8"), option=Option("int8", 32, 64))])
    assert wide.best(True, "batch of 8").option.name == "32:64 int8"  # as fast as 2:4, and loses less
    slow = made_up(**{"2of4_int8_int6_head": (0.5, 0.5, 0.5)})
    assert "it does not pay" in slow.verdict
    prompts = made_up(dense_int4_int6_head=(2, 3, 1), **{"2of4_int8_int6_head": (1.5, 2, 1.3)})
    assert all(speed in prompts.verdict for speed in ("0.67", "1.30"))


def test_speeds_of_a_busy_machine_are_not_trusted():
    found = made_up(dense_int4_int6_head=(2.1, 1, 0.9))
    found.load.add(wall=10.0, ran=9.5)
    assert "Other programs" not in found.text()
    found.load.add(wall=10.0, ran=1.5)
    warning, verdict = found.text().index("the timed thread ran 55% of the time"), found.text().index(found.verdict)
    assert warning < verdict
    assert "Other programs" in found.as_dict()["notes"][0]


@needs_kernels
def test_layers_that_the_pattern_does_not_fit_count_as_dense(quick):
    ranking = rank(Shapes({(64, 30): 2}), dtype="fp32", workloads={"one token": 1}, seconds=0.0)
    seconds = {row.option.name: row.seconds["one token"] for row in ranking.rows}
    assert seconds["2:4 fp32"] == seconds["dense fp32"]


@needs_kernels
def test_what_other_programs_take_of_a_thread_does_not_count(monkeypatch):
    """On one thread, the time is that in which it ran: others here take ten seconds at each look at the clock."""
    clock = SimpleNamespace(perf_counter=count(0, 10).__next__, thread_time=time.thread_time)
    monkeypatch.setattr(advise_module, "time", clock)
    threads, load = torch.get_num_threads(), Load()
    torch.set_num_threads(1)
    try:
        found = time_layer([torch.float32], (8, 8), [1], 0.0, load)
    finally:
        torch.set_num_threads(threads)
    assert found[1][torch.float32] < 0.1
    assert "other programs" in load.note[0].lower()


# ---- recipes for a size


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder with the config of SmolLM2-135M alone."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text((ROOT / "configs" / "models" / "smollm2-135m.json").read_text())
    return shapes_of(str(folder))


def test_the_bytes_of_a_recipe_are_those_of_the_table(smollm2):
    table = json.loads((RESULTS / "sizes.json").read_text())["smollm2"]
    assert smollm2.num_weights == recipes_module.NUM_WEIGHTS
    for name, megabytes, *_ in table["rows"]:
        option = parse_option(name)
        assert num_bytes(option, smollm2, "bf16") / 1e6 == pytest.approx(megabytes, abs=0.13)  # and headers
        assert option.name == name


def test_each_recipe_is_the_best_measured_way_to_its_weights_and_head():
    tables = json.loads((RESULTS / "sizes.json").read_text())
    ways = {(True, False): 3, (True, True): 4}  # whether weights and scales are trained: the place in the row
    dense = next(row[3] for row in tables["smollm2"]["rows"] if row[0] == "dense bf16")
    measured = {}
    for name, *row in tables["smollm2"]["rows"]:
        measured[name] = {way: row[place - 1] for way, place in ways.items() if row[place - 1] is not None}
    for weights, _, of_scales, _ in tables["oneshot"]["rows"]:
        measured[f"{weights}, int8 head"][False, True] = of_scales
    for recipe in recipes_module.recipes():
        name = recipe.option.name
        if len(found := measured.get(name, {})) and "int8," not in name:
            way = min(found, key=found.get)
            assert recipe.factor == pytest.approx(found[way] / dense), name
            assert (recipe.trains_weights, recipe.trains_scales) == way, name


def test_the_best_recipe_is_that_of_least_perplexity_or_the_smallest_where_perplexity_alone_is_limited(smollm2):
    def recipe(values, factor, n=0, m=0):
        return Recipe(Option(values, n, m, "int8"), factor)

    int8, int4, sparse, int3 = found = [
        recipe("int8", 1.01),
        recipe("int4", 1.2),
        recipe("int4", 1.6, 32, 64),
        recipe("int3", 1.5),
    ]

    def best(**limits):
        return choose(smollm2, **limits, among=found).best

    assert best(megabytes=200) is int8
    assert best(megabytes=100) is int4
    assert best(megabytes=80) is int3
    assert best(factor=1.3) is int4
    assert best(factor=1.7) in (int3, sparse)
    for limits in ({"megabytes": 10}, {"factor": 1.001}, {"megabytes": 80, "factor": 1.3}):
        with pytest.raises(InputError, match=str(next(iter(limits.values())))):
            best(**limits)


def test_a_pattern_that_divides_few_widths_is_no_recipe(tmp_path):
    shapes = shapes_of(str(save_tiny(tmp_path / "m", "llama")))  # widths of 32 and 64
    choice = choose(shapes, megabytes=1, among=[Recipe(Option("int4", 32, 64, "int8"), 1.1), INT8])
    assert [recipe for recipe, *_ in choice.candidates] == [INT8]


INT8 = Recipe(Option("int8", head="int8"), 1.01)


@needs_kernels
def test_the_command_shows_the_recipe_for_a_size_as_commands(quick, llama, capsys):
    assert main(["advise", llama, "--megabytes", "1", "--tokens-per-second", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(row["is_best"] for row in report["recipes"]) == 1
    assert all(row["tokens_per_second"] > 0 for row in report["recipes"])
    assert report["commands"][0][:3] == ["castlm", "quantize", llama]
    assert main(["advise", llama, "--megabytes", "1"]) == 0
    assert shlex.join(report["commands"][0]) in capsys.readouterr().out


def test_limits_that_no_recipe_keeps_are_refused(llama, capsys):
    command = ["shrink", llama, "text.txt", "--output-dir", "out"]
    assert_refused(
        [
            ([*command, "--megabytes", "0.001"], "0.001"),
            ([*command, "--perplexity-at-most", "0.5x"], "0.5x"),
            ([*command], "--megabytes"),
        ],
        capsys,
    )


SHORT = ("--max-steps", "2", "--seq-len", "64")


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("head", ["int8", "int4"])  # int8 reads no text
@pytest.mark.parametrize("trains_weights", [False, True])
def test_shrink_trains_scales(trains_weights, head, llama, text, tmp_path, monkeypatch):
    recipe = Recipe(Option("int3", 0, 0, head), 1.0, trains_weights=trains_weights, trains_scales=True)
    monkeypatch.setattr(recipes_module, "recipes", lambda: (recipe,))
    assert main(["shrink", llama, text, "--megabytes", "1", "--output-dir", str(tmp_path / "out"), *SHORT]) == 0
    specs = read_specs(read_header(tmp_path / "out" / "packed" / FILE)).values()
    assert {spec.values for spec in specs} == {"int3", head}
    assert Facts.read(tmp_path / "out" / "packed").quantized.train_steps == 2
    assert (tmp_path / "out" / "run").exists() == trains_weights


@needs_kernels
@pytest.mark.slow
def test_shrink_makes_the_packed_folder_and_goes_on_where_it_stopped(llama, text, tmp_path, monkeypatch, capsys):
    trained = Recipe(Option("int4", 2, 4, "int4"), 1.0, trains_weights=True)  # whose head reads the text
    monkeypatch.setattr(recipes_module, "recipes", lambda: (INT8, trained))
    command = ["shrink", llama, text, "--megabytes", "1", "--output-dir", str(tmp_path / "out"), *SHORT]
    assert main(command) == 0
    specs = read_specs(read_header(tmp_path / "out" / "packed" / FILE)).values()
    assert {(spec.values, spec.pattern) for spec in specs} == {("int4", "2:4"), ("int4", "dense")}
    assert_refused([(command, "--resume")], capsys)
    shutil.rmtree(tmp_path / "out" / "packed")
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "out" / "packed" / FILE).is_file()
