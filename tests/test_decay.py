"""The ramps of the decays, and the decay budget against a run of AdamS itself: both its verdicts come true."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS, decay_alpha, decay_budget


def run(lr: float, steps: int, decay: str):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 32) * 0.1)
    optimizer = AdamS([{"params": [weight], "sparse": True}], lr=lr, lam=1.0, total_steps=steps, decay=decay)
    alphas = [decay_alpha(t, steps, decay) for t in range(steps)]
    budget = decay_budget([(weight, optimizer.mask(weight))], [lr] * steps, alphas, decay)
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    masked = weight.detach()[~optimizer.mask(weight)].abs()
    return budget, float(masked.quantile(0.99))


@pytest.mark.parametrize("decay", ["proportional", "additive"])
def test_verdict_comes_true(decay):
    budget, residue = run(2e-2, 100, decay)
    assert budget.reaches_zero
    assert residue < 3 * budget.floor
    budget, residue = run(1e-4, 100, decay)
    assert not budget.reaches_zero
    assert residue > 0.01
    assert budget.factor > 5
    assert "horizon" in budget.explain()
    assert f"{budget.factor:.1f}x the steps" in budget.explain()


def test_horizon_always_reaches():
    budget, residue = run(1e-6, 20, "horizon")
    assert budget.reaches_zero
    assert budget.floor == residue == 0
    assert "'horizon' reaches zero" in budget.explain()


def test_travel_and_quantiles_are_the_sums_they_say():
    weight = torch.arange(1.0, 401).view(1, -1)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    budget = decay_budget([(weight, mask)], [0.5, 1.0, 2.0], [0.0, 0.5, 1.0], "proportional")
    assert budget.travel == 2.5
    assert budget.quantiles == pytest.approx((200, 360, 396, 400), abs=1)
    assert budget.floor == 2.0


def budget_of(*weights: torch.Tensor, **more):
    masked = [(weight, torch.zeros_like(weight, dtype=torch.bool)) for weight in weights]
    return decay_budget(masked, [0.01], [1.0], "additive", **more)


def test_quantiles_are_over_all_masked_weights_and_not_over_layers():
    wide, narrow = torch.full((2000, 2000), 0.001), torch.ones(64, 128)  # 4,000,000 and 8,192: 0.2 %
    budget = budget_of(wide, narrow)
    assert budget.quantiles == pytest.approx((0.001, 0.001, 0.001, 1.0), rel=5e-4)
    assert budget.reaches_zero
    # and not at every k-th weight: 1 % of 8 M, all in odd columns
    weight = torch.full((2000, 4000), 0.001)
    weight[:, 1::50] = 1.0
    assert budget_of(weight).quantiles[2] == pytest.approx(1.0, rel=5e-4)


@pytest.mark.parametrize("cuts", [(300,), (1, 2, 700), (999,)])
def test_the_quantiles_do_not_depend_on_the_ranks_that_share_the_rows(cuts):
    weight = torch.randn(1000, 40, generator=torch.Generator().manual_seed(1)) ** 3
    whole = budget_of(weight)
    counts = []
    parts = torch.tensor_split(weight, cuts)
    for part in parts:
        budget_of(part, total=lambda own: counts.append(own) or own)
    assert budget_of(parts[0], total=lambda own: sum(counts)) == whole
    assert whole.quantiles[2] == pytest.approx(float(weight.abs().flatten().sort().values[39599]), rel=5e-4)


@pytest.mark.parametrize("weights", [(), (torch.empty(0, 4),)])
def test_without_masked_weights_there_is_nothing_to_bring_to_zero(weights):
    budget = budget_of(*weights)
    assert budget.quantiles == (0, 0, 0, 0)
    assert budget.reaches_zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_quantiles_of_any_dtype_are_of_its_values(dtype):
    weight = torch.tensor([[0.5, -4.0, 0.0, 1e-30, 3.0]], dtype=dtype)
    assert budget_of(weight).quantiles == pytest.approx((0.5, 3.0, 3.0, 4.0), rel=5e-4)
    assert budget_of(torch.zeros(3, 4, dtype=dtype)).quantiles == (0, 0, 0, 0)


@pytest.mark.parametrize("name", DECAYS)
def test_every_ramp_starts_at_zero_and_stays_in_range(name):
    alphas = [decay_alpha(step, 100, name, 0.3) for step in range(101)]
    assert alphas[0] == 0
    assert all(0 <= a <= b <= 1 for a, b in pairwise(alphas))
    assert (alphas[-1] == 1) == DECAYS[name].reduces
