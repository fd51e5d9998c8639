"""The cheapest rows of `python -m benchmarks`, without thresholds: they run and report a figure."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks import frontier, gap_figure, gpu, growth, levels, memory, structured, tics
from benchmarks.masks import apex_mask, topk_mask
from benchmarks.rows import Row, interleaved, ratio_row
from safetensors.torch import load_file

from castlm.cli.main import main
from castlm.core import native
from castlm.core.errors import InputError
from castlm.core.nm import nm_mask
from castlm.distributed.world import init_world
from castlm.inference import native as inference_native
from tests.ranks import start_command, wait_ranks
from tests.stub_backend import StubBackend
from tests.tiny import TEXT, save_tiny


def test_the_cheapest_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    benchmarks.main(["--only", "state", "--threads", "1", "--json", str(tmp_path / "out.json")])
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.slow
def test_growth_has_a_point_a_size_and_exponents_of_both(tmp_path, monkeypatch, capsys):
    """Sizes that say nothing, in this process, where a peak may be 0."""
    world = init_world("cpu", "full")

    def measure_here(cases):
        measured = []
        for case in cases:
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            memory.prepare(case, folder)
            measured.append(memory.measure(case, folder, world))
        return measured

    axes = growth.make_axes(growth.llama(64, 2), [(64, 2), (64, 3)], lengths=[32], rows=[1, 2], ranks=[1])
    axes = {name: axes[name] for name in ("parameters", "sequences a batch")}
    monkeypatch.setattr(growth, "measure_in_child", measure_here)
    monkeypatch.setattr(growth, "exponents", lambda x, y: {"overall": min(y), "last": 1.0, "beyond_constant": None})
    found = growth.measure_axes(axes, together=True)
    (small, large), rows = ([point["x"] for point in axis["points"]] for axis in found.values())
    assert 500_000 < small < large
    assert rows == [1, 2]
    assert all(axis["exponents"]["seconds"]["overall"] > 0 for axis in found.values())
    printed = capsys.readouterr().out
    assert printed.count(" MiB\n") == 4
    assert printed.count("beyond a constant -\n") == 4


def test_exponents_see_through_a_constant():
    x = [1, 2, 3, 5]
    found = growth.exponents(x, [100 + 3 * v**1.5 for v in x])
    assert 0 < found["overall"] < found["last"] < 0.3
    assert found["beyond_constant"] == pytest.approx(1.5)
    assert growth.exponents(x, [7 * v**2 for v in x]) == pytest.approx(dict.fromkeys(found, 2.0))
    assert growth.exponents([1, 2], [1, 2])["beyond_constant"] is None
    assert growth.exponents([1, 2, 4], [3, 3, 4])["beyond_constant"] is None
    assert growth.exponents([1, 2, 4], [5, 4, 6])["beyond_constant"] is None


@pytest.mark.skipif(not levels.VECTORS, reason="there are no vector kernels")
def test_levels_are_timed_in_turns(tmp_path):
    threads, level = torch.get_num_threads(), inference_native.level()
    levels.main(["--quick", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    inference_native.use_level(level)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["weights"] for row in rows[:6]] == ["2:4 bf16"] * 3 + ["1:4 bf16"] * 3
    assert rows[2]["shape"] == [64, 128]
    assert all(rows[2][f"{name} / GEMM"] > 0 for name in levels.VECTORS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_none(tmp_path):
    process = start_command("benchmarks.gpu", log=tmp_path / "log")
    assert wait_ranks([process], 60) == [2]
    said = (tmp_path / "log").read_text().strip()
    assert said == "benchmarks.gpu: torch sees no CUDA device; run it on a machine with one"


@pytest.mark.skipif(native.kernels() is None, reason="AdamS is fused on a CPU by the C++ kernels, which are not built")
def test_gpu_checks_hold_on_a_cpu():
    gpu.check_adams("cpu")
    gpu.check_masks("cpu")


def test_gpu_rows_sum_the_layers_of_a_block_and_keep_the_faster():
    def seconds(variant, shape, tokens):
        if variant == "dense":
            return 1.0
        return 0.5 if tokens > 4 else 2.0

    rows = list(gpu.layer_rows("7B", 64, "cpu", StubBackend(seconds)))
    assert len(rows) == 2 * 6
    values = {row.part: row.value for row in rows}
    assert values["7B layers, decode, 1 tokens: 2:4 in all"] == 0.5
    assert values["7B layers, decode, 1 tokens: to_semi_structured_"] == 1.0
    assert (
        values["7B layers, prefill, 64 tokens: 2:4 in all"]
        == values["7B layers, prefill, 64 tokens: to_semi_structured_"]
        == pytest.approx(2.0)
    )
    assert all(row.met is not False for row in rows)


def test_gpu_end_to_end_runs_a_decode_step_and_a_prefill_of_both_models():
    backend = StubBackend(lambda variant, shape, tokens: 2.0 if variant == "dense" else 1.0)
    rows = list(gpu.end_to_end_rows(64, "cpu", backend))
    assert [row.part.rpartition(", ")[2] for row in rows] == ["batch 1", "batch 64", "4,096 tokens"]
    assert all(row.detail["converted_layers"] == row.detail["layers"] == 14 for row in rows)


def test_gpu_parts_that_fail_leave_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def check(*device):
        """It holds."""

    for name in ("check_nccl", "check_adams", "check_masks"):
        monkeypatch.setattr(gpu, name, check)
    monkeypatch.setattr(gpu, "training_rows", lambda *_: iter([Row("step", "other", 1.0, 1.0, 1.0)]))
    with pytest.raises(SystemExit) as stop:  # the build of torch for CPUs has no sparse kernels
        gpu.main(["--json", str(tmp_path / "out.json")])
    assert stop.value.code == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["failed"]) == ["2:4 kernels"]
    assert [row["part"] for row in found["rows"]] == ["step"]
    assert "failed: 2:4 kernels" in capsys.readouterr().err


@pytest.mark.skipif(inference_native.kernels() is None, reason="the C++ kernels are not built")
@pytest.mark.slow
def test_frontier_has_a_row_a_format_and_counts_the_bytes_of_a_packed_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "NEW_TOKENS", 2)
    folder = save_tiny(tmp_path / "m", "llama", hidden_size=64, head_dim=16)
    (tmp_path / "t.txt").write_text(TEXT)
    sizes = ["--sequences", "2", "--eval-tokens", "256", "--seq-len", "64", "--calibration-len", "64", "--rounds", "1"]
    text = str(tmp_path / "t.txt")
    out = str(tmp_path / "out.json")
    frontier.main(["--model", str(folder), "--text", text, "--calibration", text, *sizes, "--json", out])
    points = {point["name"]: point for point in json.loads(Path(out).read_text())["points"]}
    forms = [*frontier.FORMATS, *frontier.WITH_HEADS]
    assert list(points) == [*(f"dense {form}" for form in forms), *(f"2:4 {form}" for form in forms[1:])]
    assert all(point["tokens_per_second"] > 0 and point["perplexity"] > 1 for point in points.values())
    assert "| 2:4 int4 |" in capsys.readouterr().out

    assert main(["prune", "--model", str(folder), "--output-dir", str(tmp_path / "s"), "--method", "magnitude"]) == 0
    for head, name in (([], "2:4 int8"), (["--head", "int8"], "2:4 int8, int8 head")):
        command = ["quantize", str(tmp_path / "s"), "--output-dir", str(tmp_path / "q"), "--save-dtype", "bf16"]
        assert main([*command, "--packed", *head, "--overwrite"]) == 0
        packed = load_file(tmp_path / "q" / "castlm.safetensors")
        assert sum(tensor.nbytes for tensor in packed.values()) == points[name]["num_bytes"]


@pytest.mark.slow
def test_structured_patterns_have_a_table_and_speeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(structured, "SEQUENCES", 8)
    monkeypatch.setattr(structured, "PROMPT", 32)
    dense = save_tiny(tmp_path / "dense")
    for seed, pruned in ((0, 8.0), (1, 9.0)):
        for method in ("cast", "finetune"):
            folder = tmp_path / "runs" / f"{method}-{seed}" / "model"
            save_tiny(folder)
            config = {"method": method, "init_from": "flap", "decay_end": 0.1, "max_steps": 10, "seed": seed}
            figures = {"dense": 6.0, "one_shot": 12.0, "pruned": pruned if method == "cast" else 2 * pruned}
            record = {"pattern": "channels:0.5", "config": config, "perplexity": figures}
            (folder / "castlm.json").write_text(json.dumps(record))
    out = tmp_path / "out.json"
    arguments = ["--runs", str(tmp_path), "--shape", str(dense), "--patterns", "channels:0.5", "--repeats", "1"]
    structured.main([*arguments, "--json", str(out), "--plot", str(tmp_path / "plot.svg")])
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| channels:0.5 | flap | decay over 10% | 10 | 2 | 12.00 ± 0.00 | 8.50 ± 0.71 | -0.6931" in printed
    assert "| channels:0.5 | flap | cut | 10 | 2 | 12.00 ± 0.00 | 17.00 ± 1.41 |  |" in printed
    speed = json.loads(out.read_text())["speed"]["channels:0.5"]
    assert 0 < speed["parameters"] < 1
    assert speed["prefill"] > 0
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held_out.txt").write_text(TEXT[:1000])
    texts = str(tmp_path / "text.txt"), str(tmp_path / "held_out.txt")
    rows = structured.score_rows(str(dense), *texts, ["heads:0.5"], seeds=1, seq_len=16)
    assert {score for _, score in rows} == {"magnitude", "flap", "taylor"}
    assert all(len(values) == 2 and values[0][0] > 1 for values in rows.values())


def test_the_figure_of_the_start_shows_the_gaps_of_its_table(tmp_path):
    results, plot = Path(__file__).parents[1] / "docs" / "results", tmp_path / "plot.svg"
    page = results / "stories260k-start.md"
    gap_figure.main([str(page), "--tokens-per-step", "512", "--plot", str(plot)])
    drawn, stored = (re.search("<!-- (.*) -->", file.read_text()) for file in (plot, results / "stories260k-start.svg"))
    assert drawn[1] == stored[1]  # the lines around it are matplotlib's, which differ between its versions
    gaps = gap_figure.read_gaps(page.read_text())
    assert gaps["finetune, plain"][100] == 0.570
    assert gaps["the default, cast"][6400] == 0.161
    with pytest.raises(InputError, match="no table with a column `variant`"):
        gap_figure.read_gaps("| variant | ppl |\n|---|---|\n| a | 3.2 (+0.570) |\n")


def test_tics_are_counted_in_the_files_that_git_tracks(tmp_path, capsys):
    (tmp_path / "a.py").write_text('"""Of one layer."""\n"""What it says so goes on."""\n')
    (tmp_path / "b.md").write_text("that of a, those of b, of which what is\n")
    for name in ("c.txt", "untracked.md"):
        (tmp_path / name).write_text("that of\n")
    for command in (["init", "-q"], ["add", "a.py", "b.md", "c.txt"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert list(tics.count(tmp_path).values()) == [1, 1, 0, 2, 1, 1, 1, 1]
    tics.main([str(tmp_path), "--where"])
    assert "b.md:1: that of a" in capsys.readouterr().out
