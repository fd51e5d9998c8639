"""Gradual magnitude pruning: masked weights get no gradient, and the masks stay once every group is n:m."""

import torch

from castlm.core.nm import count_nm_violations
from castlm.core.sparsify import sparse_linears, weight_parameter
from castlm.methods.base import forward_mask
from castlm.training.verdict import perplexities_when_sparse
from tests.runs import begin_run, small
from tests.tiny import VOCAB_SIZE

IDS = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


def test_masked_weights_get_no_gradient_and_the_masks_stay_from_the_second_half_on(llama, text, tmp_path):
    options = {"method": "gradual_magnitude", "max_steps": 40, "mask_interval": 5, "learning_rate": 0.05}
    run = begin_run(small(llama, text, tmp_path / "run", **options))
    layer = next(iter(sparse_linears(run.model)[0].values()))
    shares, last = [], None
    for step in range(40):
        run.method.before_forward(step)
        mask = forward_mask(layer).clone()
        if step % 5 == 0:
            shares.append(float((~mask).float().mean()))
        if step > 20:
            assert torch.equal(mask, last)
            assert step < 25 or run.method.flips() == 0
        run.optimizer.zero_grad()
        run.model(input_ids=IDS, labels=IDS).loss.backward()
        gradient = weight_parameter(layer).grad
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].any()
        run.optimizer.step()
        last = mask
    assert shares == sorted(shares)
    assert (shares[0], shares[4]) == (0.0, 0.5)
    assert count_nm_violations(last.float()) == 0


def test_a_run_is_judged_by_what_it_measured_since_every_group_is_masked():
    perplexities = {0: 5.0, 20: 40.0, 24: 50.0, 25: 70.0, 30: 60.0, 40: 55.0}
    figures = {str(step): {"perplexity": value, "prune_now_ppl": value} for step, value in perplexities.items()}
    assert perplexities_when_sparse(figures, 40, mask_interval=5) == [70.0, 60.0]
