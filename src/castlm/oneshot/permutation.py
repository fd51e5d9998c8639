"""Finds the order of an axis under which an n:m prune of the weights along it keeps most.

Only which channels share a group matters. Starting from channels dealt out by importance, as in RIA (Zhang et al.
2024), one channel of every group is taken out in turn and all of them are put back where they are worth most: a linear
assignment, solved exactly, so that the kept score never falls.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from castlm.core.pattern import NM

_ROUNDS = 20
_PATIENCE = 6  # rounds without a gain after which the search ends
_ROWS = 256  # of the score that the search looks at
_MIN_GAIN = 1e-6


def kept_score(score: Tensor, pattern: NM) -> float:
    """The sum of the n largest of each m consecutive columns of a score (rows, columns)."""
    return float((score * pattern.mask(score)).sum())


def find_permutation(score: Tensor, pattern: NM) -> Tensor:
    """The order of columns, int64 (columns,), under which `score` (rows, columns, no negative) keeps most."""
    score = score.float().cpu()
    if len(score) > _ROWS:
        score = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(0))[:_ROWS]]
    order = _dealt(score, pattern.m)
    best, since_gain = kept_score(score[:, order], pattern), 0
    columns = score.T.contiguous()
    generator = torch.Generator().manual_seed(0)
    for number in range(_ROUNDS):
        candidate = _reassigned(columns, order, number, pattern, generator)
        value = kept_score(score[:, candidate], pattern)
        since_gain = 0 if value > best * (1 + _MIN_GAIN) else since_gain + 1
        if value >= best:
            best, order = value, candidate
        if since_gain == _PATIENCE:
            break
    return order


def _dealt(score: Tensor, m: int) -> Tensor:
    """Columns from the most to the least important, dealt out to the groups one after another."""
    ranked = score.sum(0).argsort(descending=True, stable=True)
    return ranked.view(m, -1).T.reshape(-1)


def _reassigned(columns: Tensor, order: Tensor, number: int, pattern: NM, generator: torch.Generator) -> Tensor:
    """`order` after one column of each group has been taken out and all of them are put back by linear assignment."""
    n, m = pattern.n, pattern.m
    groups = order.view(-1, m)
    everyone = torch.arange(len(groups))
    first_rounds = torch.full((len(groups),), m - 1 - number)
    leaving = first_rounds if number < m else torch.randint(m, (len(groups),), generator=generator)
    stays = torch.ones_like(groups, dtype=torch.bool)
    stays[everyone, leaving] = False
    leavers = groups[everyone, leaving]
    rest = columns[groups[stays].view(-1, m - 1)]  # (groups, m - 1, rows)
    cut = rest.topk(n, dim=1).values[:, n - 1]  # the weakest that is kept so far
    candidates = columns[leavers]  # (groups, rows)
    cost = -torch.stack([torch.maximum(threshold, candidates).sum(1) for threshold in cut])
    cost -= cost.amin(1, keepdim=True)  # the assignment stays, and is found two to four times as fast
    cost -= cost.amin(0)
    _, chosen = linear_sum_assignment(cost.numpy())
    new = groups.clone()
    new[everyone, leaving] = leavers[torch.as_tensor(chosen)]
    return new.reshape(-1)
