"""Work on a GPU against that on a CPU; skipped without a GPU. `python -m benchmarks.gpu` compares the parts."""

import pytest
import torch

from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.options import NO_REFINEMENTS, Refinements
from castlm.world import init_world
from tests.runs import begin_run, small
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("more", [{}, {"step_in_backward": True, "moments_on_host": True}])
def test_a_step_an_evaluation_and_a_checkpoint_of_a_run(more, llama, text, tmp_path):
    options = more | {"init_from": "magnitude", "max_steps": 2, "mask_interval": 1, "eval_tokens": 128}
    run = begin_run(small(llama, text, tmp_path / "run", **options), init_world("auto", "full"))
    assert run.precision == "bf16"
    with run.recording():
        run.log(run.train_step())
        run.evaluate()
        run.save()
        run.saver.finish()
    assert all(p.is_cuda for p in run.optimizer.sparse_params())
    assert all(mask.is_cuda for mask in run.method.masks().values())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_model_is_that_of_a_cpu(method):
    ids = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    options = {"calibration": ids, "effort": "best"}
    options["refinements"] = Refinements() if method == "sparsegpt" else NO_REFINEMENTS
    here, there = tiny_model("llama"), tiny_model("llama").to("cuda")
    prune_oneshot_(here, method, **options)
    prune_oneshot_(there, method, **options)
    with torch.no_grad():
        found, expected = there(ids.to("cuda")).logits.cpu(), here(ids).logits
    assert (found - expected).norm() < 0.02 * expected.norm()
