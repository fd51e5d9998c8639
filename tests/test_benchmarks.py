"""The benchmarks that `python -m benchmarks --quick` does not run, and the masks of the rivals."""

import json
import re
from pathlib import Path

import pytest
import torch
from benchmarks import bits, frontier, gpu, peer
from benchmarks.masks import apex_mask, topk_mask
from safetensors.torch import load_file

from castlm.cli.main import main
from castlm.core import native
from castlm.core.nm import nm_mask
from castlm.evaluation.perplexity import perplexity
from castlm.packed import native as inference_native
from tests.ranks import start_command, wait_ranks
from tests.runs import prune_to
from tests.tiny import TEXT, save_tiny, tiny_model


def test_rivals_make_the_same_masks():
    weight = torch.randn(8, 16)
    assert torch.equal(topk_mask(weight), nm_mask(weight))
    assert torch.equal(apex_mask(weight).bool(), nm_mask(weight))


class _Runner:
    """A tiny model in transformers, as a peer."""

    def __init__(self, folder, name, threads, all_logits):
        self.model, self.all_logits = tiny_model("llama"), all_logits
        self.reset()

    def reset(self):
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def step(self, ids):
        self.ids = torch.cat([self.ids.reshape(len(ids), -1), torch.from_numpy(ids)], 1)
        with torch.no_grad():
            logits = self.model(self.ids).logits.numpy()
        return logits if self.all_logits else logits[:, -1:]


def test_a_peer_answers_with_the_perplexity_of_castlm_and_seconds(monkeypatch, capsys):
    ids = torch.randint(64, (40,))
    requests = [
        {"format": "x", "what": "perplexity", "ids": ids.tolist(), "seq_len": 16},
        {"format": "x", "what": "read", "ids": ids[:8].reshape(2, 4).tolist()},
        {"format": "x", "what": "steps", "ids": [[1], [2]], "new_tokens": 3},
    ]
    monkeypatch.setattr("sys.stdin", map(json.dumps, requests))
    monkeypatch.setattr("sys.argv", ["peer", "answer", "folder", "1"])
    peer.main(lambda source, folder: None, _Runner)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0]["perplexity"] == pytest.approx(perplexity(tiny_model("llama"), ids, seq_len=16).perplexity)
    assert [answer.keys() for answer in answers[1:]] == [{"seconds"}] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_none(tmp_path):
    process = start_command("benchmarks.gpu", log=tmp_path / "log")
    assert wait_ranks([process], 60) == [2]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "CUDA" in line


@pytest.mark.skipif(native.kernels() is None, reason="AdamS is fused on a CPU by the C++ kernels, which are not built")
def test_gpu_checks_hold_on_a_cpu():
    for check in gpu.CHECKS:
        check("cpu")


@pytest.mark.skipif(inference_native.kernels() is None, reason="the C++ kernels are not built")
@pytest.mark.slow
def test_frontier_has_a_row_a_format_and_counts_the_bytes_of_a_packed_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "LONG_PROMPT", 32)
    folder = save_tiny(tmp_path / "m", "llama", hidden_size=64, head_dim=16)
    (tmp_path / "t.txt").write_text(TEXT)
    sizes = ["--sequences", "2", "--eval-tokens", "256", "--seq-len", "64", "--calibration-len", "64", "--rounds", "1"]
    text = str(tmp_path / "t.txt")
    out = str(tmp_path / "out.json")
    chosen = ["--pattern", "2:4", "8:16", "--heads", "int6", "--peers", "torch", "--json", out]
    frontier.main(["--model", str(folder), "--text", text, "--calibration", text, *sizes, *chosen])
    points = {point["name"]: point for point in json.loads(Path(out).read_text())["points"]}
    forms = [*frontier.FORMATS, *(form._replace(head="int6") for form in frontier.FORMATS[2:])]
    sparse = [f"{pattern} {form}" for pattern in ("2:4", "8:16") for form in forms[1:]]
    assert list(points) == [*(f"dense {form}" for form in forms), *sparse, "dense int8, torch dynamic"]
    assert all(min(point["seconds"]["batch"]) > 0 and point["perplexity"] > 1 for point in points.values())
    shown = capsys.readouterr().out
    assert re.search(r"\| 2:4 int4 \| \d", shown)
    assert re.search(r"\| 8:16 int4 \| \d.* to ", shown)  # in units of the fastest dense one
    assert "in units of the fastest dense" in shown

    quality, figure = str(tmp_path / "quality.json"), tmp_path / "figure.svg"
    base = ["--model", str(folder), "--text", text, *sizes, "--peers", "--pattern", "2:4", "--formats", "bf16", "int8"]
    frontier.main([*base, "--calibration", text, "--quality-only", "--json", quality])
    frontier.main([*base, "--speeds-only", "--quality", quality, "--json", out, "--plot", str(figure)])
    for point in json.loads(Path(out).read_text())["points"]:  # both in one table
        assert point["perplexity"] == points[point["name"]]["perplexity"]
        assert point["seconds"].keys() == {"decode", "read", "batch"}
    assert figure.stat().st_size > 0

    prune_to(tmp_path / "s", folder)
    for head, name in (("source", "2:4 int8"), ("int6", "2:4 int8, int6 head")):
        command = ["quantize", str(tmp_path / "s"), "--output-dir", str(tmp_path / "q"), "--save-dtype", "bf16"]
        assert main([*command, "--packed", "--head", head, "--overwrite"]) == 0
        packed = load_file(tmp_path / "q" / "castlm.safetensors")
        assert sum(tensor.nbytes for tensor in packed.values()) == points[name]["num_bytes"]


@pytest.mark.skipif(inference_native.kernels() is None, reason="the C++ kernels are not built")
@pytest.mark.slow
def test_bits_makes_each_row_once_and_runs_from_one_start(tmp_path, monkeypatch, users_effort):
    folder = save_tiny(tmp_path / "m", "llama", hidden_size=64, head_dim=16)
    (tmp_path / "t.txt").write_text(TEXT)
    texts = ["--text", str(tmp_path / "t.txt"), "--eval-text", str(tmp_path / "t.txt"), "--seq-len", "32"]
    command = ["--model", str(folder), *texts, "--output-dir", str(tmp_path / "out"), "--seeds", "1", "--steps", "2"]
    command += ["--rate", "1e-5", "--ways", "trained rounding", "--cells", "2:4/4", "2:4/3"]
    ran = []
    monkeypatch.setattr(bits, "castlm", lambda words: ran.append(words[0]) or main(words))
    bits.main([*command, "--heads", "int8"])
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert [(row["pattern"], row["bits"], row["head"]) for row in rows] == [("2:4", 4, "int8"), ("2:4", 3, "int8")]
    assert all(row["perplexity"] == pytest.approx(row["as_trained"], rel=0.02) for row in rows)
    assert ran == ["prune", "train", "pack", "eval", "train", "pack", "eval"]
    bits.main([*command, "--heads", "int8"])
    assert json.loads((tmp_path / "out" / "rows.json").read_text())["rows"] == rows
    assert len(ran) == 7
