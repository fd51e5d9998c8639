"""The advisor: its shapes, its roofline against what others measured, and what it says."""

import json
from dataclasses import replace

import pytest
from benchmarks import advisor

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.inference import native, this_device
from castlm.inference.advise import Shapes, advise, layer_shapes, shapes_of
from castlm.inference.devices import DEVICES, Device, find_device
from castlm.inference.published import EVIDENCE, evidence, kernel_times
from castlm.inference.roofline import cpu_formats, gpu_formats, layer_seconds
from tests.tiny import save_tiny, tiny_model

LLAMA_1B = Shapes({(2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16}, (128256, 2048))
LLAMA_7B = Shapes({(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}, (32000, 4096))


def test_shapes_come_from_the_config_alone(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama")
    expected = Shapes({(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}, (264, 32))
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert layer_shapes(tiny_model("llama")) == shapes_of(str(folder)) == expected


def test_experts_are_said_not_to_be_counted(tmp_path):
    shapes = shapes_of(str(save_tiny(tmp_path / "m", "qwen3_moe")))
    advice = advise(shapes, DEVICES["h100"], tokens=1)
    assert shapes.num_expert_weights > 0
    assert f"The {shapes.num_expert_weights:,} weights of the experts are not in these figures." in advice.text()


def test_conv1d_layers_count_as_linear(tmp_path):
    folder = save_tiny(tmp_path / "m", "gpt2")
    assert shapes_of(str(folder)).blocks == {(96, 32): 2, (32, 32): 2, (64, 32): 2, (32, 64): 2}


def test_the_roofline_is_right_on_nine_of_ten_published_cells():
    row = advisor.published_row()
    assert row.met, row.value


def test_it_advises_against_2_4_where_a_1b_model_decodes_on_an_h100():
    for device in ("h100", "h100-pcie"):
        for tokens in (1, 64):
            advice = advise(LLAMA_1B, find_device(device), tokens=tokens)
            assert advice.speedup("2:4 bf16") < 0.8
            assert advice.verdict.startswith("Do not use 2:4 for speed")
            assert advice.mixed_speedup >= 1


def test_it_advises_2_4_where_a_7b_model_reads_a_prompt_on_an_h100():
    advice = advise(LLAMA_7B, find_device("h100"), tokens=4096)
    assert 1.3 < advice.speedup("2:4 bf16") < 2
    assert advice.verdict.startswith("Use 2:4")


def test_formats_are_those_the_device_has_hardware_for():
    names = [form.name for form in advise(LLAMA_7B, find_device("a100"), tokens=1).formats]
    assert names[:2] == ["bf16", "2:4 bf16"]
    assert "fp8" not in names
    assert "2:4 fp8" in [form.name for form in advise(LLAMA_7B, find_device("h100"), tokens=1).formats]


def test_measured_seconds_decide_when_given():
    def seconds(form, shape, tokens):
        return 0.5 if form.sparse and shape == (4096, 4096) else 1.0

    advice = advise(LLAMA_7B, find_device("h100"), tokens=1, seconds=seconds)
    assert {row.shape: row.best for row in advice.rows} == {
        (4096, 4096): "2:4 bf16",
        (11008, 4096): "bf16",
        (4096, 11008): "bf16",
    }
    assert advice.source == "measured here"
    assert advice.mixed_speedup == pytest.approx(225 / 161)


def test_a_layer_whose_width_does_not_divide_by_4_stays_dense():
    advice = advise(Shapes({(64, 30): 1}), find_device("h100"), tokens=1, seconds=lambda form, shape, tokens: form.bits)
    assert advice.rows[0].best == "bf16"
    assert advice.rows[0].seconds["2:4 bf16"] == advice.rows[0].seconds["bf16"]


def test_text_and_json_carry_the_verdict_and_the_sources():
    advice = advise(LLAMA_1B, find_device("h100"), tokens=1)
    text = advice.text()
    assert advice.verdict in text
    assert "arXiv 2603.05232" in text
    assert "data sheet" in text
    content = advice.as_dict()
    assert content["verdict"] == advice.verdict
    assert content["speedup"]["bf16"] == 1
    assert {row["device"] for row in content["evidence"]} == {"h100-pcie"}


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no record of the device 'tpu': choose one of this, a100"):
        find_device("tpu")
    with pytest.raises(InputError, match="0 tokens"):
        advise(LLAMA_1B, find_device("h100"), tokens=0)
    with pytest.raises(InputError, match="a100 has no fp8: choose one of bf16"):
        advise(LLAMA_1B, find_device("a100"), tokens=1, dtype="fp8")


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_dtype_that_a_cpu_lacks_is_refused_with_those_that_the_command_takes(dtype, tmp_path, capsys):
    if native.kernels() is None:
        pytest.skip("the C++ kernels are not built")
    folder = save_tiny(tmp_path / "m", "llama")
    capsys.readouterr()
    assert main(["advise", str(folder), "--device", "this", "--dtype", dtype]) == 2
    assert f"has no {dtype}: choose one of fp32, bf16, fp16\n" in capsys.readouterr().err


def test_every_published_figure_is_of_a_known_device_and_has_a_source():
    assert all(row.device in DEVICES and row.source and row.speedup > 0 for row in EVIDENCE)
    assert {cell.device for cell in kernel_times()} <= set(DEVICES)
    assert all(cell.sparse_us > 0 and cell.dense_us > 0 for cell in kernel_times())
    assert all(found.decode for found in evidence("h200", 1))


def test_time_grows_with_every_dimension():
    device, (dense, sparse, *_) = find_device("a100"), gpu_formats("bf16")
    base = layer_seconds(device, dense, (4096, 4096), 64)
    assert layer_seconds(device, dense, (8192, 4096), 64) > base
    assert layer_seconds(device, dense, (4096, 8192), 64) > base
    assert layer_seconds(device, dense, (4096, 4096), 4096) > base
    assert layer_seconds(device, sparse, (8192, 8192), 4096) < layer_seconds(device, dense, (8192, 8192), 4096)


def test_the_command_prints_the_table_and_writes_json(tmp_path, capsys):
    folder = save_tiny(tmp_path / "m", "llama")
    assert main(["advise", str(folder), "--device", "h100", "--tokens", "64", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "Do not use 2:4 for speed at 64 tokens on h100" in printed
    assert "64 x 32" in printed
    assert json.loads((tmp_path / "a.json").read_text())["device"] == "h100"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device", "tpu"], "no record of the device 'tpu'"),
        (["--device", "a100", "--dtype", "fp8"], "a100 has no fp8"),
        (["--device", "a100", "--measure"], "--measure times the device at hand"),
        (["--device", "a100", "--tokens", "0"], "--tokens = 0 is out of range: it must be at least 1"),
    ],
)
def test_the_command_complains_in_one_line(tmp_path, capsys, options, complaint):
    folder = save_tiny(tmp_path / "m", "llama")
    capsys.readouterr()
    assert main(["advise", str(folder), *options]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_model_is_not_replaced_by_the_advice(tmp_path, capsys):
    folder = save_tiny(tmp_path / "m", "llama")
    before = (folder / "config.json").read_text()
    assert main(["advise", str(folder), "--device", "h100", "--json", str(folder / "config.json")]) == 2
    assert (folder / "config.json").read_text() == before


def test_fp32_on_a_gpu_is_not_advised_on(tmp_path, capsys):
    folder = save_tiny(tmp_path / "m", "llama")
    assert main(["advise", str(folder), "--device", "h100", "--dtype", "fp32"]) == 2
    assert "h100 has no fp32" in capsys.readouterr().err


def test_a_cpu_is_timed_and_advised_on_with_the_kernels_of_castlm(tmp_path, capsys):
    if native.kernels() is None:
        pytest.skip("the C++ kernels are not built")
    folder = save_tiny(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    capsys.readouterr()
    assert main(["advise", str(folder), "--device", "this", "--tokens", "1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["speedup"]) == {form.name for form in cpu_formats("bf16")}
    assert found["source"] == "roofline"


def test_the_cpu_timer_multiplies_by_every_format(monkeypatch):
    if native.kernels() is None:
        pytest.skip("the C++ kernels are not built")
    monkeypatch.setattr(this_device, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(this_device, "_ROUNDS", 1)
    for dtype in ("bf16", "fp16", "fp32"):
        timer = this_device.CpuTimer(cpu_formats(dtype))
        assert all(timer.seconds(form, (64, 128), 4) > 0 for form in timer.formats)
    device = this_device.this_cpu()
    assert device.bandwidth > 0
    advice = advise(Shapes({(64, 128): 1, (64, 30): 1}), device, tokens=1, dtype="fp32")
    assert advice.rows[1].best == "fp32"


def test_a_prompt_on_a_cpu_takes_what_its_kernels_for_many_rows_take():
    peak = dict.fromkeys(("bf16", "int8", "int4"), 1e11)
    avx2 = Device("this", "cpu", 1e10, peak, peak, "made up", level="avx2")
    forms = {form.name: form for form in cpu_formats("bf16")}

    def seconds(device: Device, name: str, tokens: int) -> float:
        return layer_seconds(device, forms[name], (2048, 2048), tokens)

    assert seconds(avx2, "bf16", 1) / seconds(avx2, "2:4 bf16", 1) > 1.5
    assert seconds(avx2, "bf16", 512) == seconds(avx2, "2:4 bf16", 512)  # both are unpacked for the library's GEMM
    assert seconds(avx2, "int8", 512) / seconds(avx2, "2:4 int8", 512) == pytest.approx(1.5)
    intel = replace(avx2, level="avx512 intel")  # whose GEMM is as fast as the kernels
    assert seconds(intel, "bf16", 512) == seconds(intel, "2:4 bf16", 512)
    amx = replace(avx2, level="amx")
    assert seconds(amx, "2:4 bf16", 1) == seconds(avx2, "2:4 bf16", 1)
    assert seconds(avx2, "2:4 bf16", 512) / seconds(amx, "2:4 bf16", 512) > 2
    assert seconds(amx, "2:4 bf16", 512) / seconds(amx, "2:4 bf16", 16) < 20  # of 32: tiles are arranged once in each
    assert seconds(amx, "torch bf16", 512) == seconds(avx2, "torch bf16", 512)
    fast_torch = replace(amx, peak=(faster := {**peak, "torch bf16": 1e12}), sparse_peak=faster)
    text = advise(LLAMA_1B, fast_torch, tokens=512).text()
    assert "torch bf16, which needs no packing, is 2.70x as fast as castlm's dense layers." in text
    assert "needs no packing" not in advise(LLAMA_1B, amx, tokens=512).text()


def test_the_benchmark_row_counts_noticeable_cells_alone():
    device = Device("this", "cpu", 1e10, dict.fromkeys(("bf16", "int8", "int4"), 3e10), {}, "made up")
    device = replace(device, sparse_peak=device.peak)
    forms = {form.name: form for form in cpu_formats("bf16")}
    truth = {((576, 576), 1): {n: layer_seconds(device, form, (576, 576), 1) for n, form in forms.items()}}
    assert advisor.measured_row(truth, device).value == 1
    upside_down = {key: {n: 1 / s for n, s in cell.items()} for key, cell in truth.items()}
    assert advisor.measured_row(upside_down, device).value == 0
