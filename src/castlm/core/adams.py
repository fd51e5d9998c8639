"""AdamS: Adam whose masked weights decay to zero while the forward pass stays dense.

The equations are in `castlm.core.update`. The mask is optimizer state: it is up to `mask_interval` steps old, so it
cannot be recomputed from the weights on resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from castlm.core import native
from castlm.core.decay import DECAYS
from castlm.core.errors import DivergedError, InputError, one_line
from castlm.core.moments import MOMENT_KEYS, MOMENTS, HostMoments, from_codes, moment_dtype, new_moments
from castlm.core.native import Batch
from castlm.core.nm import NM, Pattern, pack_mask, parse_pattern, refresh_masks_, replace_mask_, unpack_mask
from castlm.core.shards import check_matrix, flat, like_rows, local
from castlm.core.update import SECOND_MOMENTS, hyperparameters, update_

_TRAINED = (torch.float32, torch.float64, torch.bfloat16)  # float16 rounds eps and small squared gradients to 0
EXACT_ON_RESUME = (
    "sparse",
    "pattern",
    "total_steps",
    "mask_interval",
    "decay",
    "decay_end",
    "second_moment",
    "moments",
)
"""The options that may not change between saving and loading, because the method depends on them."""


class AdamS(Optimizer):
    r"""Adam with a sparsity mask whose masked weights decay to zero (CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8).

    For every weight of a sparse parameter, with `t` the 0-based step, `T = total_steps` and `a_t = t / T`:

    .. code-block:: text

        mu_t  = b1 mu_{t-1} + (1 - b1) g_t
        mix_t = mu_t                                          where kept
        mix_t = (1 - a_t) mu_t + a_t lam sign(W_{t-1})        where masked, decay="proportional" (the paper's, Eq. 7)
        mix_t = mu_t + a_t lam sign(W_{t-1})                  where masked, decay="additive" (its ablation)
        mix_t = (1 - a_t) mu_t                                where masked, decay="horizon" (ours)
        v_t   = b2 v_{t-1} + (1 - b2) mix_t^2                 second_moment="mix" (the paper's, Eq. 8)
        v_t   = b2 v_{t-1} + (1 - b2) g_t^2                   second_moment="gradient" (ours)
        W_t   = W_{t-1} - lr (mix_t / (1 - b1^(t+1))) / (sqrt(v_t / (1 - b2^(t+1))) + eps)
        W_t   = W_t (1 - a_{t+1}) / (1 - a_t)                 where masked, decay="horizon", in which
                                                              a_t = min(1, t / (decay_end T))

    `"horizon"` brings every masked weight to exactly zero, whatever `lr` and `lam` are. `"none"` refreshes the mask and
    decays nothing. The mask is recomputed from `|W|` at the start of every `mask_interval`-th step. Parameter groups
    with `"sparse": False` get plain Adam.

    With `"mix"`, `v` averages squares of the momentum, which are smaller than squares of single gradients, so all steps
    are larger than Adam's at the same rate; the first one is `lr / (1 - b1)`. With `"gradient"`, a learning rate has
    the same meaning as in Adam, but a `lam` would vanish beside the gradient.

    Args:
        params: parameter groups; at least one has the key `"sparse"`. A group with `"sparse": True` has masks of its
            `"pattern"` ("2:4" by default). `castlm.sparse_param_groups(model)` makes the groups of a model.
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
        moments_on_host: keep the moments in host memory, and copy those of a parameter to its device while it is
            updated. Parameters must not be sharded.
        weight_decay: decoupled weight decay, as in AdamW, of groups with `"sparse": False`; unused by sparse groups.
        fused: run the update in one pass over memory. None uses the C++ kernels for float32 parameters on a CPU if they
            are compiled. True requires them on a CPU, and uses `torch.compile` on other devices, for the refresh of the
            masks too. False runs torch operators. All follow the same equations; the last bits may differ.

    State of a sparse parameter (out, in), or (experts, out, in): `step` () float32, `exp_avg` and `exp_avg_sq` as
    `new_moments` makes them, and `mask` (..., out, ceil(in / 8)) uint8, one bit per weight, 1 = kept, as `pack_mask`
    makes it. The constructor makes all of it. Parameters may be DTensors sharded by rows, as FSDP2 makes them;
    `mask` is sharded alike.
    Gradients of another real dtype are converted to the parameter's.

    Raises:
        InputError: when a group is added: an option is out of range; no group has `"sparse"`; a parameter is complex,
            float16, not contiguous or not dense; a sparse parameter is not 2-D or 3-D, not float32 or float64, does not
            fit its pattern, is sharded along its groups or contains NaN; `fused=True` is not possible. From `step`: a
            sparse parameter has no gradient, or a gradient or parameter has another shape, layout or device than
            before.

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
        moments_on_host: bool = False,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if not any(isinstance(group, dict) and "sparse" in group for group in groups):
            raise InputError(
                "no parameter group of AdamS has the key 'sparse', so nothing would become sparse: pass "
                "castlm.sparse_param_groups(model), or 'sparse': False for plain Adam"
            )
        self._fused = fused
        self._host = HostMoments() if moments_on_host else None
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
        }
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in torch, and checks its options and parameters once; see the class.

        A sparse group that joins after the first step needs `"total_steps"` of its own, the steps that are left:
        planned over all steps, its decay could end before the weights are zero.
        """
        taken = max((int(state["step"]) for state in self.state.values()), default=0)
        if param_group.get("sparse") and taken and "total_steps" not in param_group:
            raise InputError(
                f"AdamS: a sparse group joins after {taken:,} steps, and its decay would be planned over all "
                f"{self.defaults['total_steps']:,}: give it 'total_steps', the number that is left"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._start(group)  # may raise: then the group must not stay half-made
        except BaseException:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    def _start(self, group: dict[str, Any]) -> None:
        """Checks a new group, and makes the state of its parameters."""
        group["pattern"] = parse_pattern(group["pattern"])
        if group["second_moment"] is None and isinstance(group["decay"], str) and group["decay"] in DECAYS:
            group["second_moment"] = "mix" if DECAYS[group["decay"]].needs_lam else "gradient"
        _check_options(group)
        for param in group["params"]:
            _check_parameter(param, group)
            if self._fused and param.device.type == "cpu" and not native.runs_on(local(param)):
                is_built = native.kernels() is not None
                only = f"the kernels take plain float32 tensors, not {type(local(param)).__name__} of {param.dtype}"
                raise InputError(f"fused=True is not possible: {only if is_built else native.NOT_BUILT}; or fused=None")
            moments = new_moments(param, group["moments"])
            if self._host:
                moments = self._host.on_host(moments)
            self.state[param] |= {"step": torch.tensor(0.0), **moments}
            if group["sparse"]:
                mask = group["pattern"].mask(local(param.detach()))
                self.state[param]["mask"] = like_rows(pack_mask(mask), param)

    def mask(self, param: Tensor) -> Tensor:
        """A copy of the current mask of a sparse parameter: bool, True = kept, shaped and placed like the parameter."""
        return like_rows(unpack_mask(local(self.state[param]["mask"]), param.shape[-1]), param)

    def set_mask(self, param: Tensor, mask: Tensor) -> None:
        """Replaces the mask of a sparse parameter until the next refresh.

        Args:
            mask: bool, True = kept, shaped and placed like `param`, or like this rank's part of it.

        Raises:
            InputError: `param` is no sparse parameter of this optimizer, the mask has another shape or dtype, or it
                keeps more than the pattern does.
        """
        group = next((g for g in self.param_groups if g["sparse"] and any(param is own for own in g["params"])), None)
        if group is None:
            raise InputError(
                f"a tensor of shape {tuple(param.shape)} is no sparse parameter of this AdamS: give a mask for "
                "castlm.weight_parameter(layer), which is the trained weight also of a layer with weight scaling"
            )
        group["pattern"].check_mask(local(mask), param)
        local(self.state[param]["mask"]).copy_(pack_mask(local(mask)))

    def momentum(self, param: Tensor) -> Tensor:
        """A copy of this rank's part of the first moment of a parameter, (numel,), in fp32 however it is stored."""
        state = self.state[param]
        if "exp_avg_scale" not in state:
            return flat(state["exp_avg"]).float()
        scale = flat(state["exp_avg_scale"])  # (1536, 9) -> (13824,), one for each 64 codes of (1536, 576)
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

    def set_flips(self, flips: int) -> None:
        """Sets what `flips` returns until the next refresh, after a resume."""
        self._flips = flips

    @torch.no_grad()
    def refresh_masks(self, group: dict[str, Any]) -> Tensor | int:
        """Recomputes the masks of a sparse group from `|W|` (CAST, Eq. 6).

        Returns the number of mask entries on this rank that changed. Raises `InputError` if a weight is NaN.
        """
        pattern: Pattern = group["pattern"]
        params = [param for param in group["params"] if local(param).numel()]  # a rank may hold no rows of a parameter
        weights = [local(param).detach() for param in params]
        packed = [local(self.state[param]["mask"]) for param in params]
        if not weights:
            return 0
        if not isinstance(pattern, NM):  # a pattern of your own, whose `mask` raises for NaN
            return sum(replace_mask_(old, pack_mask(pattern.mask(weight))) for weight, old in zip(weights, packed))
        flips, has_nan = refresh_masks_(weights, packed, pattern.n, pattern.m, bool(self._fused))
        if has_nan:
            raise DivergedError(
                "a sparse weight is NaN, so the run has diverged: start it again with a lower learning rate"
            )
        return flips

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
            for param in group["params"]:
                _check_gradient(param, self.state[param], group, self._host is not None)
        self.begin_step()
        for group in self.param_groups:
            # one by one, as only the moments of those that are updated together leave the host together
            parts = [[param] for param in group["params"]] if self._host else [group["params"]]
            for params in parts:
                self.step_group(group, params)
        self.wait_for_moments()
        return loss

    @torch.no_grad()
    def begin_step(self) -> None:
        """Refreshes the masks that are due: the first half of `step`, which `update` follows.

        Alg. 1: every T1 steps the mask is made again at the top of the step, so that step 0 has a true mask.
        """
        due = []
        for group in self.param_groups:
            if group["sparse"] and group["params"] and group["mask_interval"]:
                step = int(self.state[group["params"][0]]["step"])
                if step % int(group["mask_interval"]) == 0:  # T1 of the paper; at step 0 too
                    due.append(group)
        if due:
            self._flips = sum(map(self.refresh_masks, due))

    @torch.no_grad()
    def update(self, params: Iterable[Tensor]) -> None:
        """Updates some parameters: a part of the second half of `step`.

        Call it after `begin_step`, once for each parameter, as soon as its gradient is whole. The result equals `step`,
        whatever the order or grouping. Call it only when no later forward or backward pass needs the old weights.

        Raises:
            InputError: as `step`. None of these parameters has been changed then.
        """
        params = set(params)
        chosen = [[param for param in group["params"] if param in params] for group in self.param_groups]
        for group, some in zip(self.param_groups, chosen):
            for param in some:
                _check_gradient(param, self.state[param], group, self._host is not None)
        for group, some in zip(self.param_groups, chosen):
            self.step_group(group, some)

    def fetch_moments(self, params: Iterable[Tensor]) -> None:
        """Begins to copy the moments of parameters that are updated next from the host, if they are kept there."""
        if self._host:
            for param in params:
                self._host.fetch(param, self.state[param])

    def wait_for_moments(self) -> None:
        """Waits until all moments are on the host again, if they are kept there: before they are saved or compared."""
        if self._host:
            self._host.wait()

    def step_group(self, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        """Updates some parameters of a group by their gradients. A subclass with another rule overrides it.

        `step` and `update` call it after the masks are refreshed; it must add 1 to the `step` of each parameter.
        """
        # The numbers of the update depend on the step, and its kernels on device, dtype and kind of moments. All
        # parameters agree in these unless one joined later or is placed elsewhere.
        alike: dict[Any, list[Tensor]] = {}
        for param in params:
            if param.grad is not None:
                state = self.state[param]
                key = int(state["step"]), param.device, param.dtype, "exp_avg_scale" in state
                alike.setdefault(key, []).append(param)
        for (step, *_), params in alike.items():
            here = [p for p in params if local(p).numel()]  # a rank may hold no rows of a parameter
            # AdamW: W <- (1 - lr wd) W, before the update
            if group["weight_decay"] and not group["sparse"]:
                torch._foreach_mul_([flat(p) for p in here], 1 - float(group["lr"]) * group["weight_decay"])
            if here:
                states = [self.state[param] for param in here]
                moments = [self._host.take(p, s) if self._host else s for p, s in zip(here, states)]
                batch = Batch(
                    [local(param).detach() for param in here],
                    [local(param.grad).to(param.dtype).contiguous() for param in here if param.grad is not None],
                    {key: [local(each[key]) for each in moments] for key in MOMENT_KEYS if key in states[0]},
                    [local(state["mask"]) if group["sparse"] else None for state in states],
                )
                second_moment = group["second_moment"] if group["sparse"] else "gradient"
                update_(batch, hyperparameters(group, step), second_moment, self._fused)
                if self._host:
                    for param, state in zip(here, states):
                        self._host.give_back(param, state)
            torch._foreach_add_([self.state[param]["step"] for param in params], 1)

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in torch. Patterns are saved as text, so that loading unpickles no class."""
        saved = super().state_dict()
        groups = [{**group, "pattern": str(group["pattern"])} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, with masks and codes exactly as they were saved.

        Raises:
            InputError: the saved state is of another run or model. Nothing has been changed then.
        """
        saved_state = self._checked(state_dict)
        own_groups = self.param_groups
        # Shapes, dtypes and devices of the own state, before torch replaces it.
        states = {param: dict(state) for param, state in self.state.items()}
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, own_groups, strict=True):
            group["pattern"] = own["pattern"]
        # torch has cast all state to the dtype of its parameter: packed masks and 8-bit codes are floats now. So each
        # tensor is taken again from the saved state.
        for param, saved in saved_state.items():
            for key, tensor in states[param].items():
                value = torch.as_tensor(saved[key]).to(device=tensor.device, dtype=tensor.dtype)
                self.state[param][key] = value.pin_memory() if tensor.is_pinned() else value

    def _checked(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Mapping[str, Any]]:
        """The saved state of each parameter, after checking that all of it fits this optimizer."""
        states: dict[Tensor, Mapping[str, Any]] = {}  # torch checks the number and sizes of the groups
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            if not isinstance(saved["params"], list):
                raise InputError(
                    f"the saved optimizer state names the parameters {saved['params']!r:.100}: load another"
                )
            own = {**group, "pattern": str(group["pattern"])}
            changed = [f"{k} {saved.get(k)} -> {own[k]}" for k in EXACT_ON_RESUME if saved.get(k) != own[k]]
            if changed:
                raise InputError(
                    f"the saved optimizer state is of another run ({', '.join(changed)}): use the options of that run"
                )
            _check_options({**saved, "pattern": group["pattern"]})
            for i, param in zip(saved["params"], group["params"]):
                states[param] = state_dict["state"].get(i, {})
                then, now = _shapes_and_dtypes(states[param]), _shapes_and_dtypes(self.state[param])
                if then != now:
                    raise InputError(
                        f"the saved state of parameter {i} is {then}, not {now}: load the state of the same model and "
                        "options"
                    )
                _check_values(i, states[param])
                if group["sparse"]:
                    group["pattern"].check_mask(unpack_mask(local(states[param]["mask"]), param.shape[-1]), param)
        return states

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": self._fused, "_host": self._host, "_flips": self._flips}


def _is_bounded(value: Any, least: float = 0) -> bool:
    return bool(least <= value) and math.isfinite(value)


_NOT_NEGATIVE = (_is_bounded, "a finite number >= 0")
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "betas": (lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
    "eps": _NOT_NEGATIVE,
    "lam": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "total_steps": (lambda steps: _is_bounded(steps, 1), "a number of steps, at least 1"),
    "mask_interval": (lambda steps: _is_bounded(steps) and steps == int(steps), "a whole number of steps, at least 0"),
    "decay": (lambda name: name in DECAYS, f"one of {', '.join(DECAYS)}"),
    "decay_end": (lambda share: bool(0 < share <= 1), "a number in (0, 1]"),
    "second_moment": (lambda name: name in SECOND_MOMENTS, f"one of {', '.join(SECOND_MOMENTS)}"),
    "moments": (lambda name: name in MOMENTS, f"one of {', '.join(MOMENTS)}"),
    "sparse": (lambda sparse: type(sparse) is bool, "True or False"),
}
"""For each option of a parameter group: a check of its range, and the allowed values in words."""


def _check_options(group: Mapping[str, Any]) -> None:
    """Raises `InputError` for an option of a group that is missing, out of range or of another type."""
    for name, (check, wanted) in _OPTIONS.items():
        try:
            is_allowed = check(group[name])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):  # the last one of a tensor of several
            is_allowed = False
        if not is_allowed:
            raise InputError(f"AdamS: {name} = {group.get(name)!r} is not allowed: it must be {wanted}")
    if group["second_moment"] == "gradient" and DECAYS[group["decay"]].needs_lam:
        raise InputError(
            f"AdamS: second_moment = 'gradient' is not allowed with decay {group['decay']!r}, whose lam would be "
            "lost beside the gradient: use mix"
        )


def _check_values(number: int, state: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the saved state of parameter `number` holds values that steps can have made."""
    for name, saved in state.items():
        value = local(torch.as_tensor(saved))
        if value.dtype == torch.uint8 or not value.numel():  # any code and any bit is one
            continue
        # A negative second moment would be a NaN after the root, thousands of steps later: refused when it is loaded.
        least, most = (float(bound) for bound in value.aminmax())  # NaN if any value is
        is_signed = name == "exp_avg"
        if not (math.isfinite(least) and math.isfinite(most) and (is_signed or least >= 0)):
            raise InputError(
                f"the saved state of parameter {number} is damaged: {name} lies between {least:g} and {most:g}"
            )


def _check_parameter(param: Tensor, group: Mapping[str, Any]) -> None:
    shape = tuple(param.shape)
    if param.dtype not in _TRAINED or param.layout != torch.strided or not local(param).is_contiguous():
        strides = param.stride() if param.layout == torch.strided else ()
        raise InputError(
            f"a parameter of shape {shape} is {param.dtype} with layout {param.layout} and strides {strides}: AdamS "
            "trains contiguous, dense float32, float64 and bfloat16"
        )
    if not group["sparse"]:
        return
    check_matrix("a sparse parameter", param)
    if param.dtype == torch.bfloat16:
        raise InputError(
            f"a sparse parameter of shape {shape} is {param.dtype}, which rounds the decay away: keep fp32 master "
            "weights and use autocast or FSDP mixed precision"
        )
    group["pattern"].check_shape(shape)
    group["pattern"].check_placement(param)


def _check_gradient(
    param: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], is_on_host: bool = False
) -> None:
    """Raises `InputError` for a sparse parameter without a gradient, or one that was converted or moved since AdamS was
    built: it would train wrongly."""
    grad, moment = param.grad, state["exp_avg"]
    if grad is None and group["sparse"]:
        raise InputError(
            f"a sparse parameter of shape {tuple(param.shape)} has no gradient, so its masked weights would never "
            "decay: leave it out of the sparse group"
        )
    if grad is None:
        return
    # `model.half()` or `model.to(device)` after AdamS was built leaves moments of the old dtype or device behind.
    trained = (torch.float32, torch.float64) if group["sparse"] else _TRAINED
    is_dtype = moment.dtype in (moment_dtype(param), torch.uint8) and param.dtype in trained
    is_dtype &= grad.dtype.is_floating_point
    is_placed = param.shape == moment.shape == grad.shape and param.device == grad.device
    is_placed &= moment.device == (torch.device("cpu") if is_on_host else param.device)
    is_placed &= getattr(grad, "placements", None) == getattr(param, "placements", None)
    if not (is_dtype and is_placed and grad.layout == torch.strided and local(param).is_contiguous()):
        raise InputError(
            f"a parameter is {param.dtype} {tuple(param.shape)} on {param.device}, its gradient {grad.dtype} "
            f"{tuple(grad.shape)} {grad.layout} on {grad.device}, its moments {tuple(moment.shape)} on "
            f"{moment.device}: convert or move a model before AdamS is built; gradients are real and dense"
        )


def _shapes_and_dtypes(state: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The shape and dtype of each tensor in a parameter's state; the dtype of `step` does not matter."""
    try:
        tensors = {name: torch.as_tensor(tensor) for name, tensor in state.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the saved optimizer state holds something else than tensors: {one_line(error)}") from error
    return {name: (tuple(t.shape), () if name == "step" else t.dtype) for name, t in tensors.items()}
