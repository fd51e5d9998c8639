"""The benchmarks that `python -m benchmarks --quick` does not run, and the masks of the rivals."""

import json

import pytest
import torch
from benchmarks import gpu, peer
from benchmarks.masks import apex_mask, topk_mask

from castlm.core import native
from castlm.core.nm import nm_mask
from castlm.evaluation.perplexity import perplexity
from tests.ranks import start_command, wait_ranks
from tests.tiny import tiny_model


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
