"""The starts of each pattern: what a method reads is asked in one place; a pattern is parsed and bound in one place."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

import castlm
from castlm.cli import prune as command
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.export.verify import verify
from castlm.oneshot.methods import methods_of, prune_oneshot_, reads_of
from castlm.oneshot.solvers import SOLVERS
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.runs import record_of, small
from tests.tiny import VOCAB_SIZE, tiny_model

TOKENS = torch.randint(0, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mine(monkeypatch):
    """A solver of one's own that reads no text."""
    monkeypatch.setitem(SOLVERS, "mine", SOLVERS["magnitude"])


def test_a_solver_that_reads_no_text_needs_none(mine, llama, text, tmp_path):
    arguments = ["--model", llama, "--solver", "mine", "--output-dir"]
    assert command.main([*arguments, str(tmp_path / "command")]) == 0
    castlm.prune(llama, output_dir=tmp_path / "api", solver="mine")
    assert all(verify(tmp_path / name).ok for name in ("command", "api"))
    with pytest.raises(InputError, match=r"calibration = .* has an effect only with a solver that reads a text"):
        command.main([*arguments, str(tmp_path / "other"), "--calibration", text])
    config = small(llama, text, tmp_path / "run", init_from="mine", max_steps=2)
    assert config.needs("calibration_sequences") is not None
    train(config)
    assert record_of(tmp_path / "run" / "model")["start"]["calibration_tokens"] == 0


def test_what_a_start_reads():
    groups = NM(2, 4)
    assert list(methods_of(groups)) == ["magnitude", "wanda", "sparsegpt"]
    assert reads_of(None, groups) == (False, False, ())
    assert not reads_of(methods_of(groups)["magnitude"], groups).is_calibrated
    assert "refit_iterations" in reads_of(methods_of(groups)["sparsegpt"], groups).refinements
    assert TrainConfig.of("model", "text", "run", method="gradual_magnitude").method.row.patterns is NM


@dataclass(frozen=True)
class ByLayer(Pattern):
    """1:4 in the up-projections, and 2:4 elsewhere."""

    def __str__(self) -> str:
        return "bylayer"

    def at(self, name: str) -> NM:
        return NM(1, 4) if name.endswith("up_proj") else NM(2, 4)

    def misfit(self, shape: Iterable[int]) -> str | None:
        raise AssertionError("each layer answers for itself")

    mask = violations = misfit


def test_a_pattern_may_differ_from_layer_to_layer():
    """In the prune, the optimizer and the solvers."""

    def shares(model) -> set[tuple[bool, float]]:
        layers, _ = castlm.sparse_linears(model, ByLayer())
        return {(n.endswith("up_proj"), float((w.weight != 0).float().mean())) for n, w in layers.items()}

    pruned, solved = tiny_model("llama"), tiny_model("llama")
    groups = castlm.sparse_param_groups(pruned, ByLayer())
    assert [str(group["pattern"]) for group in groups if group["sparse"]] == ["2:4", "1:4"]
    castlm.prune_(pruned, ByLayer(), masks=castlm.AdamS(groups, total_steps=4).masks())
    prune_oneshot_(solved, "wanda", pattern=ByLayer(), calibration=TOKENS)
    assert shares(pruned) == shares(solved) == {(True, 0.25), (False, 0.5)}
