"""A decay rule is one record: a toy rule runs in AdamS, its kernels, its budget and the configuration."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS, Decay, decay_alpha, decay_budget
from castlm.core.errors import InputError
from tests.fused import needs_kernels
from tests.reference import sign

TOTAL, LR, LAM, B1, B2, EPS = 12, 0.05, 0.3, 0.9, 0.95, 1e-8

QUADRATIC = Decay(
    ramp=lambda step, total_steps, decay_end: min(1.0, (step / (decay_end * total_steps)) ** 2),
    needs_lam=True,
    exact_zero=True,
    uses_decay_end=True,
    pull=lambda alpha, lam: 2 * alpha * lam,
    keep=lambda alpha: 1 - alpha / 2,
    remaining=lambda alpha, alpha_next: 1 - alpha_next,
)


def expected_weights(weight, mask, grads):
    """The toy rule weight by weight in plain floats, as `tests/reference.py` does it for the others."""
    w, mu, v = ([row.tolist() for row in x] for x in (weight, torch.zeros_like(weight), torch.zeros_like(weight)))
    for t, grad in enumerate(grads):
        alpha, alpha_next = (min(1.0, (s / (0.5 * TOTAL)) ** 2) for s in (t, t + 1))
        for i, row in enumerate(grad.tolist()):
            for j, g in enumerate(row):
                mu[i][j] = B1 * mu[i][j] + (1 - B1) * g
                mix = mu[i][j] if mask[i][j] else (1 - alpha / 2) * mu[i][j] + 2 * alpha * LAM * sign(w[i][j])
                v[i][j] = B2 * v[i][j] + (1 - B2) * mix**2
                w[i][j] -= LR * mix / (1 - B1 ** (t + 1)) / ((v[i][j] / (1 - B2 ** (t + 1))) ** 0.5 + EPS)
                w[i][j] *= 1.0 if mask[i][j] else 1 - alpha_next
    return torch.tensor(w)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_kernels)])
def test_a_rule_that_is_one_record_works_everywhere(fused, monkeypatch):
    monkeypatch.setitem(DECAYS, "quadratic", QUADRATIC)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 8))
    options = {"lr": LR, "betas": (B1, B2), "lam": LAM, "total_steps": TOTAL, "decay_end": 0.5, "mask_interval": 0}
    optimizer = AdamS([{"params": [weight], "sparse": True}], **options, decay="quadratic", fused=fused)
    assert optimizer.param_groups[0]["second_moment"] == "mix"
    mask, grads = optimizer.mask(weight), torch.randn(TOTAL, 4, 8)
    expected = expected_weights(weight.detach(), mask.tolist(), grads)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not weight[~mask].any()
    with pytest.raises(InputError, match="lost beside the gradient"):
        AdamS([{"params": [weight], "sparse": True}], **options, decay="quadratic", second_moment="gradient")
    budget = decay_budget(
        [(torch.ones(2, 4), torch.tensor([[True, True, False, False]] * 2))], [0.1], [0.1], "quadratic"
    )
    assert budget.reaches_zero
    assert budget.floor == 0
    assert "'quadratic' reaches zero by construction" in budget.explain()


def test_the_configuration_offers_the_rules_of_the_table():
    code = (
        "from castlm.core import decay; decay.DECAYS['toy'] = decay.DECAYS['none']; "
        "from castlm.cli.main import main; main(['train', '--help-all'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert f"--decay {'|'.join((*DECAYS, 'toy'))}" in shown


@pytest.mark.parametrize("name", DECAYS)
def test_every_ramp_starts_at_zero_and_stays_in_range(name):
    alphas = [decay_alpha(step, 100, name, 0.3) for step in range(101)]
    assert alphas[0] == 0
    assert all(0 <= a <= b <= 1 for a, b in pairwise(alphas))
    assert (alphas[-1] == 1) == DECAYS[name].reduces
