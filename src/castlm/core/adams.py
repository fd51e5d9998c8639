"""AdamS: Adam whose masked weights decay to zero while the forward pass stays dense.

The optimizer loops over the update in `castlm.core.update`. The mask is optimizer state: it is up to `mask_interval`
steps old, so it cannot be recomputed from the weights on resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from castlm.core import native
from castlm.core.apply import Update
from castlm.core.checks import (
    check_gradient,
    check_keys,
    check_options,
    check_parameter,
    check_saved,
    check_sparse_parameter,
)
from castlm.core.decay import DECAYS
from castlm.core.errors import DivergedError, InputError
from castlm.core.masks import pack_mask, unpack_mask
from castlm.core.moments import from_codes, new_moments
from castlm.core.pattern import NM, Pattern, as_pattern
from castlm.core.shards import flat, like_rows, local
from castlm.core.unit_masks import gathers, own_unit_masks, refresh_gathered_
from castlm.core.update import hyperparameters


class AdamS(Optimizer):
    r"""Adam with a sparsity mask whose masked weights decay to zero (CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8).

    For every weight of a sparse parameter, with `t` the 0-based step, `T = total_steps` and `a_t = t / T`:

    .. code-block:: text

        mu_t  = b1 mu_{t-1} + (1 - b1) g_t
        mix_t = mu_t                                          where kept
        mix_t = (1 - a_t) mu_t + a_t lam sign(W_{t-1})        where masked, decay="proportional" (the paper's)
        mix_t = mu_t + a_t lam sign(W_{t-1})                  where masked, decay="additive" (its ablation)
        mix_t = (1 - a_t) mu_t                                where masked, decay="horizon" (ours)
        v_t   = b2 v_{t-1} + (1 - b2) mix_t^2                 second_moment="mix" (the paper's)
        v_t   = b2 v_{t-1} + (1 - b2) g_t^2                   second_moment="gradient" (ours)
        W_t   = W_{t-1} - lr (mix_t / (1 - b1^(t+1))) / (sqrt(v_t / (1 - b2^(t+1))) + eps)
        W_t   = W_t (1 - a_{t+1}) / (1 - a_t)                 where masked, decay="horizon", in which
                                                              a_t = min(1, t / (decay_end T))

    `"horizon"` brings every masked weight to exactly zero, whatever `lr` and `lam` are. `"none"` refreshes the mask and
    decays nothing. The mask is recomputed from `|W|` at the start of every `mask_interval`-th step. Parameter groups
    with `"sparse": False` get plain Adam.

    The square of the momentum lags behind the momentum: with `"mix"` the first step is `1 / (1 - b1)` times `lr`, and
    all steps are larger than Adam's at the same rate. With `"gradient"` a learning rate means what it does in Adam, but
    a `lam` would be lost beside the gradient.

    Args:
        params: parameter groups, at least one of which has the key `"sparse"`. A group with `"sparse": True` has masks
            of its `"pattern"` ("2:4" by default). `castlm.sparse_param_groups(model)` makes the groups of a model.
        lr: learning rate.
        total_steps: the number of steps `T` over which the decay is planned. It may not change on resume.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        lam: decay coefficient of `"proportional"` and `"additive"`, of the order of the gradient.
        mask_interval: steps between two refreshes of the masks (`T1`). With 0 the masks never change, except by
            `set_mask`.
        decay: `"horizon"`, `"proportional"`, `"additive"` or `"none"`, see `castlm.core.decay`.
        decay_end: share of `T` after which `"horizon"` has every masked weight at zero, 0 < decay_end <= 1.
        second_moment: `"gradient"` (not with a decay that needs `lam`) or `"mix"`. None uses `"gradient"` if it can.
        moments: `"fp32"`, or `"8bit"`, which needs 6 bytes less for each weight; see `castlm.core.moments`.
        weight_decay: decoupled weight decay, as in AdamW, of groups with `"sparse": False`; unused by sparse groups.
        fused: run the update in one pass over memory. None uses the C++ kernels for float32 parameters on a CPU if they
            are compiled. True requires them on a CPU, and uses `torch.compile` on other devices, for the refresh of the
            masks too. False runs torch operators. All follow the same equations; the last bits may differ. The refresh
            on a CPU takes its C++ kernel whatever `fused` is, because its result is the same.

    State of a sparse parameter (out, in), or (experts, out, in): `step` () float32, `exp_avg` and `exp_avg_sq` as
    `new_moments` makes them, and `mask` (..., out, ceil(in / 8)) uint8, one bit per weight, 1 = kept, as `pack_mask`
    makes it. All of it exists from construction on. Parameters may be DTensors sharded by rows, as FSDP2 makes them;
    `mask` is sharded alike.
    Gradients of another real dtype are converted to the parameter's.

    Raises:
        InputError: an option of the wrong type or out of range; no group has `"sparse"`; a parameter is complex,
            float16, not contiguous or not dense; a sparse parameter is not 2-D or 3-D, not float32 or float64, does not
            fit its pattern, is sharded along its groups or contains NaN; `fused=True` is not possible. From `step`: a
            sparse parameter has no gradient, or a gradient or parameter has another shape, layout or device. From
            `load_state_dict`: the saved options, shapes or dtypes differ, or a saved mask is not of the pattern.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> optimizer = AdamS([{"params": [layer.weight], "sparse": True}], lr=1e-3, total_steps=10, decay_end=0.5)
        >>> for _ in range(10):
        ...     layer(torch.ones(8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> layer.weight.count_nonzero().item()  # 2 of every 4
        8
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        total_steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lam: float = 4e-7,
        mask_interval: int = 10,
        decay: str = "horizon",
        decay_end: float = 0.1,
        second_moment: str | None = None,
        moments: str = "fp32",
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        if fused not in (None, True, False):
            raise InputError(f"AdamS: fused = {fused!r} is not allowed: it must be None, True or False")
        groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if not any(isinstance(group, dict) and "sparse" in group for group in groups):
            raise InputError(
                "no parameter group of AdamS has the key 'sparse', so nothing would become sparse: pass "
                "castlm.sparse_param_groups(model), or 'sparse': False for plain Adam"
            )
        self._fused = fused
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
            "second_moment": second_moment,
            "moments": moments,
            "weight_decay": weight_decay,
            "sparse": False,
            "pattern": NM(2, 4),
            "units": None,
        }
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in torch; see the class for what a group may hold and what is refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._init_group(group)
        except InputError:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    def _init_group(self, group: dict[str, Any]) -> None:
        group["pattern"] = as_pattern(group["pattern"])
        if group["second_moment"] is None and isinstance(group["decay"], str) and group["decay"] in DECAYS:
            group["second_moment"] = "mix" if DECAYS[group["decay"]].needs_lam else "gradient"
        check_keys(group)
        check_options(group)
        if len(set(group["params"])) != len(group["params"]):
            raise InputError("a parameter appears twice in a parameter group of AdamS: pass each once")
        for param in group["params"]:
            check_parameter(param)
            if self._fused and param.device.type == "cpu":
                native.check_runs_on(local(param))
            if group["sparse"]:
                check_sparse_parameter(param, group["pattern"])
            self.state[param] |= {"step": torch.tensor(0.0), **new_moments(param, group["moments"])}
        for unit in self._units(group) if group["sparse"] else ():
            for param, mask in zip(unit, own_unit_masks(group["pattern"], unit)):
                self.state[param]["mask"] = like_rows(pack_mask(mask), param)

    def _units(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The parameters of a sparse group by unit."""
        params = group["params"]
        units = group["units"]
        return [[param] for param in params] if units is None else [[params[i] for i in unit] for unit in units]

    def _pattern_of(self, param: Tensor) -> Pattern:
        for group in self.param_groups:
            if group["sparse"] and any(param is own for own in group["params"]):
                pattern: Pattern = group["pattern"]
                return pattern
        raise InputError(f"a parameter of shape {tuple(param.shape)} is in no sparse group of this optimizer")

    def mask(self, param: Tensor) -> Tensor:
        """A copy of the current mask of a sparse parameter: bool, True = kept, shaped and placed like the parameter."""
        if "mask" not in self.state.get(param, {}):
            raise InputError(f"a parameter of shape {tuple(param.shape)} is in no sparse group of this optimizer")
        return like_rows(unpack_mask(local(self.state[param]["mask"]), param.shape[-1]), param)

    def set_mask(self, param: Tensor, mask: Tensor) -> None:
        """Replaces the mask of a sparse parameter until the next refresh.

        Args:
            mask: bool, True = kept, shaped and placed like `param`, or like this rank's part of it.

        Raises:
            InputError: another shape or dtype, or a mask that keeps more than the pattern does.
        """
        pattern = self._pattern_of(param)
        pattern.check_mask(local(mask), local(param).shape, count=not gathers(pattern, [param]))
        local(self.state[param]["mask"]).copy_(pack_mask(local(mask)))

    def momentum(self, param: Tensor) -> Tensor:
        """A copy of this rank's part of the first moment of a parameter, (numel,), in fp32 however it is stored."""
        state = self.state[param]
        if "exp_avg_scale" not in state:
            return flat(state["exp_avg"]).float()
        scale = flat(state["exp_avg_scale"])
        return from_codes(flat(state["exp_avg"]).view(len(scale), -1), scale, signed=True).view(-1)

    def sparse_params(self) -> Iterable[Tensor]:
        """Every sparse parameter, in the order of the groups."""
        return (p for group in self.param_groups if group["sparse"] for p in group["params"])

    def masks(self) -> dict[Tensor, Tensor]:
        """The current mask of every sparse parameter, for `prune_`. They are bool: one byte per weight while held."""
        return {p: self.mask(p) for p in self.sparse_params()}

    def flips(self) -> int:
        """The number of mask entries on this rank that the latest refresh changed."""
        return int(self._flips)

    def restore_flips(self, flips: int) -> None:
        """Sets what `flips` returns until the next refresh, after a resume."""
        self._flips = flips

    @torch.no_grad()
    def refresh_masks(self, group: dict[str, Any]) -> None:
        """Recomputes the masks of a sparse group from `|W|`. Raises `InputError` if a weight is NaN."""
        if gathers(group["pattern"], group["params"]):
            units = self._units(group)
            packed = [[local(self.state[p]["mask"]) for p in unit] for unit in units]
            self._flips = refresh_gathered_(group["pattern"], units, packed)
            return
        units = [unit for unit in self._units(group) if any(local(p).numel() for p in unit)]  # a rank may hold no rows
        if not units:
            self._flips = 0
            return
        weights = [[local(p) for p in unit] for unit in units]
        masks = [[local(self.state[p]["mask"]) for p in unit] for unit in units]
        self._flips, has_nan = group["pattern"].refresh_(weights, masks, bool(self._fused))
        if has_nan:
            raise DivergedError(
                "a sparse weight is NaN, so the run has diverged: start it again with a lower learning rate"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step. Every `mask_interval`-th step refreshes the masks first, from the weights before it.

        Raises:
            InputError: see the class. No weight or moment has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_group(group)
        flips: list[Tensor | int] = []
        for group in filter(self._is_refresh_due, self.param_groups):
            self.refresh_masks(group)
            flips.append(self._flips)
        if flips:
            self._flips = sum(flips)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _is_refresh_due(self, group: dict[str, Any]) -> bool:
        if not (group["sparse"] and group["params"] and group["mask_interval"]):
            return False
        return int(self.state[group["params"][0]]["step"]) % int(group["mask_interval"]) == 0

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group)
        for param in group["params"]:
            if param.grad is not None:
                check_gradient(param, self.state[param])
            elif group["sparse"]:
                raise InputError(
                    f"a sparse parameter of shape {tuple(param.shape)} has no gradient, so its masked weights would "
                    "never decay: leave it out of the sparse group"
                )

    def _step_group(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = {}  # one entry unless a parameter joined later or is placed elsewhere
        for param in group["params"]:
            if param.grad is not None:
                state = self.state[param]
                key = int(state["step"]), param.device, param.dtype, "exp_avg_scale" in state
                alike.setdefault(key, []).append(param)
        for (step, _, _, in_8bit), params in alike.items():
            second_moment = group["second_moment"] if group["sparse"] else "gradient"
            hyper = hyperparameters(group, step)
            here = [p for p in params if local(p).numel()]  # a rank may hold no rows of a parameter
            if group["weight_decay"] and not group["sparse"]:
                torch._foreach_mul_([flat(p) for p in here], 1 - float(group["lr"]) * group["weight_decay"])
            if here:
                Update(self.state, group["sparse"], in_8bit, hyper, second_moment, self._fused).apply_(here)
            torch._foreach_add_([self.state[param]["step"] for param in params], 1)

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in torch. Patterns are saved as text, so that no class has to be unpickled."""
        saved = super().state_dict()
        groups = [{**group, "pattern": str(group["pattern"])} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, with masks and codes exactly as they were saved.

        Raises:
            InputError: the saved state is of another run, or its shapes, dtypes or masks do not fit. Nothing has been
                changed then.
        """
        saved_state = check_saved(state_dict, self.param_groups, self.state)
        kept = [(group["pattern"], group["units"]) for group in self.param_groups]
        states = {param: dict(state) for param, state in self.state.items()}
        super().load_state_dict(state_dict)
        for group, (pattern, units) in zip(self.param_groups, kept):
            group["pattern"], group["units"] = pattern, units
        for param, saved in saved_state.items():  # torch casts state to the parameter's dtype, which may round it
            for key, tensor in states[param].items():
                value = torch.as_tensor(saved[key])
                self.state[param][key] = value.to(device=tensor.device, dtype=tensor.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": self._fused, "_flips": self._flips}
