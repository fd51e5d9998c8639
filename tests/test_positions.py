"""Documents in one training sequence: they do not attend to each other, in every family, or the family is refused."""

import pytest
import torch

from castlm.core.errors import InputError
from castlm.data.packing import document_positions
from castlm.training.attention import way_to_keep_apart
from castlm.training.objective import Objective
from castlm.training.trainer import Trainer
from castlm.world import init_world
from tests.runs import small
from tests.slow import slow_but
from tests.tiny import FAMILIES, tiny_model

END = 0


def test_positions_start_again_with_each_document():
    begins = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    expected = [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert document_positions(begins).tolist() == expected


@pytest.mark.parametrize("family", slow_but(("llama", "opt", "gpt2"), FAMILIES))
def test_a_packed_document_is_trained_like_one_alone(family):
    model = tiny_model(family).eval()
    vocab = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, vocab, (1, size), generator=generator) for size in (7, 9))
    packed = torch.cat([first, torch.tensor([[END]]), second], dim=1)
    labels = torch.full_like(packed, -100)
    labels[:, 8:-1] = packed[:, 9:]
    positions = torch.tensor([[*range(8), *range(9)]])
    objective = Objective(model, model, 0.5, apart=True)
    objective.check_documents_apart()
    together = objective(packed, labels, 8, positions)
    alone = objective(second, labels[:, 8:], 8)
    assert together.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    crossing = Objective(model, model, 0.5)(packed, labels, 8)
    assert crossing.loss.item() != pytest.approx(alone.loss.item(), rel=1e-5)
    evaluated = objective(packed, labels, 8, positions, ce_only=True)
    assert evaluated.ce.item() == pytest.approx(crossing.ce.item(), rel=1e-5)  # the usual protocol


@pytest.mark.parametrize("kind", ["Bloom", "Mamba"])
def test_a_family_that_cannot_keep_documents_apart_is_refused_by_name(kind):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "n_layer": 1, "n_head": 2, "state_size": 4}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with pytest.raises(InputError, match=f"{kind}ForCausalLM .*cross_document_attention"):
        Objective(model, apart=True).check_documents_apart()
    Objective(model).check_documents_apart()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize("passes", [0, 1])
def test_memory_that_runs_out_is_not_taken_for_a_family_that_cannot(error, passes, monkeypatch):
    model, left = tiny_model("llama"), [passes]
    forward = type(model.model).forward

    def failing(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return forward(*args, **options)

    monkeypatch.setattr(type(model.model), "forward", failing)
    with pytest.raises(RuntimeError, match="memory"):
        way_to_keep_apart(model)


def test_a_teacher_cache_of_crossing_documents_is_refused_by_a_run_that_keeps_them_apart(llama, text, tmp_path):
    fields = {"teacher_top_k": 4, "teacher_cache": str(tmp_path / "cache")}
    world = init_world("cpu", "full")
    Trainer(small(llama, text, tmp_path / "run", cross_document_attention=True, **fields), world)
    with pytest.raises(InputError, match="cross_document_attention True -> False"):
        Trainer(small(llama, text, tmp_path / "run", **fields), world)
