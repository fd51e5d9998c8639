"""AdamS: Adam whose masked weights are pulled to zero while the forward pass stays dense.

One pure fp32 update function, `adams_update`, and an optimizer that loops over it. The mask is optimizer state: it is
up to `mask_interval` steps old, so it cannot be recomputed from the weights. `tests/reference.py` holds the equations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from castlm.core.errors import InputError
from castlm.core.masks import nm_mask, rank_mask
from castlm.core.pattern import check_pattern, check_width

DECAYS = ("horizon", "proportional", "additive", "none")
EXACT_ON_RESUME = ("sparse", "n", "m", "total_steps", "mask_interval", "decay", "decay_end")


def decay_alpha(step: int, total_steps: int, decay: str, decay_end: float = 0.5) -> float:
    """The ramp `a_t` of the decay before step `t = step` (0-based): linear from 0 to 1 over the horizon `total_steps`,
    and for `"horizon"` over its first `decay_end`, 1 from there on. 0 throughout for `"none"`."""
    if decay == "none":
        return 0.0
    end = decay_end * total_steps if decay == "horizon" else total_steps
    return min(1.0, step / end)


def adams_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    lam: Tensor,
    alpha: Tensor,
    remaining: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamS step on plain tensors of one shape and dtype; plain Adam where `mask` is None.

    CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8, and our `"horizon"`. All hyperparameters are 0-dimensional tensors, so
    that one compilation serves every step and every shape: `correction1 = 1 - beta1^(t+1)`, `correction2` alike, and
    `remaining = (1 - a_{t+1}) / (1 - a_t)` the share of a masked weight that outlives a `"horizon"` step. Masked and
    kept are told apart by arithmetic on 0 and 1 rather than `torch.where`: exact, and it vectorises.

    Returns:
        The new `weight`, `exp_avg` (of the raw gradient, always) and `exp_avg_sq` (of the mix, kept weights too; of the
        raw gradient where `mask` is None).
    """
    exp_avg = exp_avg * beta1 + grad * (1 - beta1)
    mix = exp_avg
    if mask is not None and decay != "none":
        masked = 1 - mask.to(weight.dtype)
        if decay in ("horizon", "proportional"):
            mix = mix * (1 - alpha * masked)
        if decay in ("proportional", "additive"):
            mix = mix + (alpha * lam) * masked * weight.sign()
    squared = grad if mask is None else mix
    exp_avg_sq = exp_avg_sq * beta2 + squared.square() * (1 - beta2)
    weight = weight - lr * (mix / correction1) / ((exp_avg_sq / correction2).sqrt() + eps)
    if mask is not None and decay == "horizon":
        weight = weight * (1 - masked * (1 - remaining))
    return weight, exp_avg, exp_avg_sq


def _update_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *rest: Any) -> None:
    new = adams_update(weight, grad, exp_avg, exp_avg_sq, *rest)
    weight.copy_(new[0])
    exp_avg.copy_(new[1])
    exp_avg_sq.copy_(new[2])


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(local: Tensor, tensor: Tensor) -> Tensor:
    """`local` as the shard of a DTensor laid out like `tensor`, or as it is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def check_sparse_parameter(param: Tensor, n: int, m: int) -> None:
    """Whether AdamS can keep n:m masks on `param`. Raises `InputError` when it is not 2-D (FSDP1 and ZeRO flatten), is
    half precision (bf16 swallows `lam`), has a width that does not divide by `m`, or is sharded along its groups."""
    check_pattern(n, m)
    shape = tuple(param.shape)
    if param.dim() != 2:
        raise InputError(
            f"a sparse parameter has shape {shape}, not (out, in): sharding that flattens parameters (FSDP1, DeepSpeed "
            "ZeRO) cuts groups apart; use FSDP2 fully_shard"
        )
    if param.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"a sparse parameter of shape {shape} is {param.dtype}, which swallows the decay: keep fp32 master weights "
            "and use autocast or FSDP mixed precision"
        )
    check_width(param.shape[1], m)
    if isinstance(param, DTensor):
        for placement in param.placements:
            if not (placement.is_replicate() or placement == Shard(0)):
                raise InputError(
                    f"a sparse parameter of shape {shape} is placed as {placement}, which splits groups of {m}: shard "
                    "its rows, Shard(0)"
                )


class AdamS(Optimizer):
    r"""Adam with an n:m mask whose masked weights decay to zero (CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8).

    For every weight of a sparse parameter, with `t` the 0-based step, `T = total_steps` and `a_t = t / T`:

    .. code-block:: text

        mu_t  = b1 mu_{t-1} + (1 - b1) g_t
        mix_t = mu_t                                          where kept
        mix_t = (1 - a_t) mu_t + a_t lam sign(W_{t-1})        where masked, decay="proportional" (the paper's)
        mix_t = mu_t + a_t lam sign(W_{t-1})                  where masked, decay="additive" (its ablation)
        mix_t = (1 - a_t) mu_t                                where masked, decay="horizon" (ours)
        v_t   = b2 v_{t-1} + (1 - b2) mix_t^2
        W_t   = W_{t-1} - lr (mix_t / (1 - b1^(t+1))) / (sqrt(v_t / (1 - b2^(t+1))) + eps)
        W_t   = W_t (1 - a_{t+1}) / (1 - a_t)                 where masked, decay="horizon", in which
                                                              a_t = min(1, t / (decay_end T))

    `"horizon"` brings a masked weight to exactly zero whatever `lr` and `lam` are; `"none"` tracks the mask and decays
    nothing. The mask is taken anew from `|W|` at the top of every `mask_interval`-th step. Parameter groups without
    `"sparse": True` get plain Adam.

    Args:
        params: parameters, or groups; a group with `"sparse": True` is sparse with its `"n"` and `"m"` (2 and 4 when
            not given). `castlm.sparse_param_groups(model)` makes the two groups of a model.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        lam: decay coefficient of `"proportional"` and `"additive"`, of the order of the gradient.
        total_steps: the horizon `T`, which has to be given. It is part of the method: it may not change on resume.
        mask_interval: steps between two refreshes of the masks (`T1`).
        decay: `"horizon"`, `"proportional"`, `"additive"` or `"none"`.
        decay_end: share of `T` after which `"horizon"` has every masked weight at zero, 0 < decay_end <= 1.
        compile: run the update and the refresh through `torch.compile`: one pass over memory, one compilation.

    State of a sparse parameter (out, in): `step` () float32, `exp_avg` and `exp_avg_sq` like the parameter, `mask`
    bool, True = kept; all exist from construction on. Parameters may be DTensors sharded by rows, as FSDP2 makes them.

    Raises:
        InputError: on hyperparameters out of range; on sparse parameters that are not 2-D, not fp32, of a width that
            does not divide by `m`, sharded along it, or hold NaN; from `step` when a sparse parameter has no gradient;
            from `load_state_dict` when the saved horizon or pattern differs.

    Example:
        >>> optimizer = AdamS(sparse_param_groups(model), lr=3e-4, total_steps=1000)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> prune_(model, masks=optimizer.masks())
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lam: float = 4e-7,
        total_steps: int = 0,
        mask_interval: int = 10,
        decay: str = "horizon",
        decay_end: float = 0.5,
        *,
        compile: bool = False,
    ) -> None:
        for name, value, right, remedy in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("betas", betas, all(0 <= b < 1 for b in betas), "in [0, 1)"),
            ("eps", eps, eps >= 0, ">= 0"),
            ("lam", lam, lam >= 0, ">= 0"),
            ("total_steps", total_steps, total_steps >= 1, "given, at least 1"),
            ("mask_interval", mask_interval, mask_interval >= 1, "at least 1"),
            ("decay", decay, decay in DECAYS, f"one of {', '.join(DECAYS)}"),
            ("decay_end", decay_end, 0 < decay_end <= 1, "in (0, 1]"),
        ):
            if not right:
                raise InputError(f"AdamS: {name} = {value!r} is out of range: it must be {remedy}")
        self._update = _compiled(_update_) if compile else _update_
        self._rank_mask = _compiled(rank_mask) if compile else rank_mask
        self._flips: Tensor | int = 0
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "lam": lam,
            "total_steps": total_steps,
            "mask_interval": mask_interval,
            "decay": decay,
            "decay_end": decay_end,
            "sparse": False,
            "n": 2,
            "m": 4,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if group["sparse"]:
                check_sparse_parameter(param, group["n"], group["m"])
            state = self.state[param]
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if group["sparse"]:
                state["mask"] = _like(nm_mask(_local(param), group["n"], group["m"]), param)

    def mask(self, param: Tensor) -> Tensor:
        """The current mask of a sparse parameter: bool, True = kept, shaped and laid out like the parameter."""
        mask: Tensor = self.state[param]["mask"]
        return mask

    def sparse_params(self) -> Iterable[Tensor]:
        """Every sparse parameter, in the order of the groups."""
        return (p for group in self.param_groups if group["sparse"] for p in group["params"])

    def masks(self) -> dict[Tensor, Tensor]:
        """The current mask of every sparse parameter, for `prune_`."""
        return {p: self.mask(p) for p in self.sparse_params()}

    def flips(self) -> int:
        """Mask entries on this rank that the newest refresh changed."""
        return int(self._flips)

    def restore_flips(self, flips: int) -> None:
        """Sets what `flips` says until the next refresh, after a resume."""
        self._flips = flips

    @torch.no_grad()
    def refresh_masks(self, group: dict[str, Any]) -> None:
        """Takes the masks of a sparse group anew from `|W|`. Raises `InputError` when a weight is NaN."""
        nan, flips = [], []
        for param in group["params"]:
            magnitude = _local(param).abs()
            if magnitude.numel() == 0:  # a rank may hold no row of a small weight
                continue
            new = self._rank_mask(magnitude, group["n"], group["m"])
            mask = _local(self.mask(param))
            nan.append(magnitude.amax().isnan())
            flips.append((new != mask).sum())
            mask.copy_(new)
        if nan and torch.stack(nan).any():
            raise InputError("a sparse weight is NaN: the run has diverged; resume from a checkpoint at a lower rate")
        self._flips = torch.stack(flips).sum() if flips else 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; at every `mask_interval`-th the masks are refreshed first, from the weights before the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["sparse"] and group["params"]:
                if any(p.grad is None for p in group["params"]):
                    raise InputError(
                        "a sparse parameter has no gradient, so its masked weights would never decay: leave it out of "
                        "the sparse group"
                    )
                if int(self.state[group["params"][0]]["step"]) % group["mask_interval"] == 0:
                    self.refresh_masks(group)
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        scalars: dict[int, list[Tensor]] = {}  # step -> hyperparameters; one entry unless a parameter joined later
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            step = int(state["step"])
            if step not in scalars:
                alpha, alpha_next = (
                    decay_alpha(s, group["total_steps"], group["decay"], group["decay_end"]) for s in (step, step + 1)
                )
                remaining = (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0
                values = (float(group["lr"]), beta1, beta2, group["eps"], group["lam"], alpha, remaining)
                corrections = (1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1))
                scalars[step] = [torch.tensor(v, dtype=torch.float64) for v in (*values, *corrections)]
            mask = _local(state["mask"]).view(-1) if group["sparse"] else None
            tensors = (_local(t) for t in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
            flat = [t.contiguous().view(-1) if t is param.grad else t.view(-1) for t in tensors]
            self._update(*flat, mask, *scalars[step], group["decay"])
            state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with masks bool as they were saved. Raises `InputError` when what may not change does."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            changed = [f"{k} {saved.get(k)} -> {group[k]}" for k in EXACT_ON_RESUME if saved.get(k) != group[k]]
            if changed:
                raise InputError(f"the saved optimizer state is of another run ({', '.join(changed)}): use its values")
        super().load_state_dict(state_dict)
        for param in self.sparse_params():  # torch casts state to the parameter's dtype: 0 and 1 in fp32, exact
            self.state[param]["mask"] = self.state[param]["mask"].to(torch.bool)
