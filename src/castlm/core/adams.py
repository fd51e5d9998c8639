"""AdamS: Adam whose masked weights are pulled to zero while the forward pass stays dense.

The optimizer that loops over the update of `castlm.core.update`. The mask is optimizer state: it is up to
`mask_interval` steps old, so it cannot be recomputed from the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from castlm.core import native
from castlm.core.errors import InputError
from castlm.core.masks import bits_of_a_word, compiled, nm_mask, pack_mask, refresh_masks_, unpack_mask
from castlm.core.moments import MOMENT_KEYS, MOMENTS, from_codes, new_moments
from castlm.core.shards import check_sparse_parameter, flat, like_rows, local
from castlm.core.update import DECAYS, SECOND_MOMENTS, Columns, hyperparameters, update_, update_words_

_SMALL = 65_536  # dense tensors below this many weights are updated as one
_CALL = 8  # tensors of one size that one call of the compiled update takes
EXACT_ON_RESUME = ("sparse", "n", "m", "total_steps", "mask_interval", "decay", "decay_end", "second_moment", "moments")


def _calls(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """`params` in lots of `_CALL` of one size, and the rest one by one: two compilations serve all sizes, and a call of
    a compiled function, which costs as much as 100,000 weights, is made for eight."""
    by_size: dict[int, list[Tensor]] = {}
    for param in params:
        by_size.setdefault(local(param).numel(), []).append(param)
    for same in by_size.values():
        whole = len(same) // _CALL * _CALL
        yield from (same[i : i + _CALL] for i in range(0, whole, _CALL))
        yield from ([param] for param in same[whole:])


class AdamS(Optimizer):
    r"""Adam with an n:m mask whose masked weights decay to zero (CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8).

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

    `"horizon"` brings a masked weight to exactly zero whatever `lr` and `lam` are; `"none"` tracks the mask and decays
    nothing. The mask is taken anew from `|W|` at the top of every `mask_interval`-th step. Parameter groups without
    `"sparse": True` get plain Adam.

    The square of the momentum lags behind the momentum: with `"mix"` the first step is `1 / (1 - b1)` times `lr`, and
    all are larger than Adam's at the same rate. With `"gradient"` a rate means what it does in Adam, but a `lam` would
    be lost beside the gradient.

    Args:
        params: parameters, or groups; a group with `"sparse": True` is sparse with its `"n"` and `"m"` (2 and 4 when
            not given). `castlm.sparse_param_groups(model)` makes the two groups of a model.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        lam: decay coefficient of `"proportional"` and `"additive"`, of the order of the gradient.
        total_steps: the horizon `T`, which has to be given. It is part of the method: it may not change on resume.
        mask_interval: steps between two refreshes of the masks (`T1`); 0 leaves them as they are, or as `set_mask` has
            them.
        decay: `"horizon"`, `"proportional"`, `"additive"` or `"none"`.
        decay_end: share of `T` after which `"horizon"` has every masked weight at zero, 0 < decay_end <= 1.
        second_moment: `"gradient"`, for `"horizon"` and `"none"` only, or `"mix"`; None takes the former where it can.
        moments: `"fp32"`, `"bf16"` (the first moment), or `"8bit"` (both): less memory, see
            `castlm.core.moments`.
        fused: run the update and the refresh in one pass over memory: by the C++ kernels on a CPU, through
            `torch.compile` on a GPU. Of the same equations; the last bits may differ.

    State of a sparse parameter (out, in): `step` () float32, `exp_avg` and `exp_avg_sq` as `new_moments` has them,
    `mask` (out, ceil(in / 8)) uint8, a bit a weight, 1 = kept, as `pack_mask` lays them out; all exist from
    construction on.
    Parameters may be DTensors sharded by rows, as FSDP2 makes them; `mask` is sharded alike.

    Raises:
        InputError: on hyperparameters out of range; on sparse parameters that are not 2-D, not fp32, of a width that
            does not divide by `m`, sharded along it, or hold NaN; on a parameter that is not contiguous; when `fused`
            and the C++ kernels are not built, or parameters on a CPU are not fp32; from `step` when a sparse parameter
            has no gradient; from `load_state_dict` when the saved horizon or pattern differs.

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
        decay_end: float = 0.1,
        second_moment: str | None = None,
        moments: str = "fp32",
        *,
        fused: bool = False,
    ) -> None:
        by_itself = decay in ("horizon", "none")  # reaches zero, or nothing, whatever lam is
        second_moment = second_moment or ("gradient" if by_itself else "mix")
        for name, value, right, remedy in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("betas", betas, all(0 <= b < 1 for b in betas), "in [0, 1)"),
            ("eps", eps, eps >= 0, ">= 0"),
            ("lam", lam, lam >= 0, ">= 0"),
            ("total_steps", total_steps, total_steps >= 1, "given, at least 1"),
            ("mask_interval", mask_interval, mask_interval >= 0, "at least 0"),
            ("decay", decay, decay in DECAYS, f"one of {', '.join(DECAYS)}"),
            ("decay_end", decay_end, 0 < decay_end <= 1, "in (0, 1]"),
            ("second_moment", second_moment, second_moment in SECOND_MOMENTS, f"one of {', '.join(SECOND_MOMENTS)}"),
            ("second_moment", second_moment, second_moment != "gradient" or by_itself, f"mix with decay {decay!r}"),
            ("moments", moments, moments in MOMENTS, f"one of {', '.join(MOMENTS)}"),
        ):
            if not right:
                raise InputError(f"AdamS: {name} = {value!r} is out of range: it must be {remedy}")
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
            "sparse": False,
            "n": 2,
            "m": 4,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if not local(param).is_contiguous():
                shape, stride = tuple(param.shape), param.stride()
                raise InputError(f"a parameter of shape {shape} has strides {stride}: make it contiguous for AdamS")
            if self._fused and param.device.type == "cpu":
                native.check_runs_on(local(param))
            if group["sparse"]:
                check_sparse_parameter(param, group["n"], group["m"])
            state = self.state[param]
            state["step"] = torch.tensor(0.0)
            state |= new_moments(param, group["moments"])
            if group["sparse"]:
                state["mask"] = like_rows(pack_mask(nm_mask(local(param), group["n"], group["m"])), param)

    def mask(self, param: Tensor) -> Tensor:
        """The current mask of a sparse parameter: bool, True = kept, shaped and placed like the parameter. A copy."""
        return like_rows(unpack_mask(local(self.state[param]["mask"]), param.shape[1]), param)

    def set_mask(self, param: Tensor, mask: Tensor) -> None:
        """Replaces the mask of a sparse parameter, until the next refresh, by a bool `mask` shaped and placed alike."""
        local(self.state[param]["mask"]).copy_(pack_mask(local(mask)))

    def momentum(self, param: Tensor) -> Tensor:
        """This rank's part of the first moment of a parameter, (numel,), in fp32 whatever it is kept in. A copy."""
        state = self.state[param]
        if "exp_avg_scale" not in state:
            return flat(state["exp_avg"]).float()
        scale = flat(state["exp_avg_scale"])
        return from_codes(flat(state["exp_avg"]).view(len(scale), -1), scale, signed=True).view(-1)

    def sparse_params(self) -> Iterable[Tensor]:
        """Every sparse parameter, in the order of the groups."""
        return (p for group in self.param_groups if group["sparse"] for p in group["params"])

    def masks(self) -> dict[Tensor, Tensor]:
        """The current mask of every sparse parameter, for `prune_`: bool, a byte a weight as long as they are held."""
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
        here = [p for p in group["params"] if local(p).numel()]  # a rank may hold no row of a small weight
        if not here:
            self._flips = 0
            return
        masks = [local(self.state[p]["mask"]) for p in here]
        self._flips, has_nan = refresh_masks_([local(p) for p in here], masks, group["n"], group["m"], self._fused)
        if has_nan:
            raise InputError("a sparse weight is NaN: the run has diverged; resume from a checkpoint at a lower rate")

    def _lots(self, params: Sequence[Tensor], in_8bit: bool) -> Iterable[list[Tensor]]:
        """What one call of `_run` takes: one by one where several would hold their new moments at the same time."""
        return _calls(params) if self._fused and not in_8bit else ([param] for param in params)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return (compiled(function) if self._fused else function)(*args)

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
                interval = group["mask_interval"]
                if interval and int(self.state[group["params"][0]]["step"]) % interval == 0:
                    self.refresh_masks(group)
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = {}  # one entry unless a parameter joined later or lives elsewhere
        for param in group["params"]:
            if param.grad is not None:
                state = self.state[param]
                key = int(state["step"]), param.device, param.dtype, "exp_avg_scale" in state
                alike.setdefault(key, []).append(param)
        for (step, device, dtype, in_8bit), params in alike.items():
            hyper = hyperparameters(group, step)
            second_moment = group["second_moment"] if group["sparse"] else "gradient"
            here = [p for p in params if local(p).numel()]  # a rank may hold no row of one
            if self._fused and here and native.runs_on(local(here[0])):
                self._update_native(here, group["sparse"], hyper, second_moment)
            else:
                dtype = torch.float64 if dtype == torch.float64 else torch.float32
                update = self._update_sparse if group["sparse"] else self._update_dense
                update(here, in_8bit, torch.tensor(hyper, dtype=dtype, device=device), second_moment)
            torch._foreach_add_([self.state[param]["step"] for param in params], 1)

    def _held(self, params: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """This rank's gradients, and its moments by name, with the scales of 8-bit ones."""
        grads = [local(p.grad).contiguous() for p in params if p.grad is not None]
        keys = [key for key in MOMENT_KEYS if key in self.state[params[0]]]
        return grads, {key: [local(self.state[p][key]) for p in params] for key in keys}

    def _update_native(
        self, params: Sequence[Tensor], sparse: bool, hyper: Sequence[float], second_moment: str
    ) -> None:
        masks = [local(self.state[p]["mask"]) if sparse else None for p in params]
        native.update_([local(p).detach() for p in params], *self._held(params), masks, hyper, second_moment)

    def _columns(self, params: Sequence[Tensor]) -> Columns:
        """This rank's weights, gradients and moments, and the scales of 8-bit ones."""
        grads, moments = self._held(params)
        columns = [list(params), grads, *moments.values()]
        scales = [key.endswith("_scale") for key in ("", "", *moments)]
        if not any(scales):
            return [[flat(tensor) for tensor in column] for column in columns]
        shapes = [(local(self.state[p]["exp_avg_scale"]).numel(), -1) for p in params]
        return [
            [flat(tensor) if is_scale else flat(tensor).view(shape) for tensor, shape in zip(column, shapes)]
            for column, is_scale in zip(columns, scales)
        ]

    def _update_sparse(self, params: Sequence[Tensor], in_8bit: bool, *rest: Any) -> None:
        for some in self._lots(params, in_8bit):
            columns = self._columns(some)
            if self._fused and all(p.shape[1] % 8 == 0 and local(p).numel() % 32 == 0 for p in some):
                words = [flat(flat(self.state[p]["mask"]).view(torch.int32)) for p in some]
                self._run(update_words_, columns, words, bits_of_a_word(words[0].device), in_8bit, *rest)
            else:
                self._run(update_, columns, [flat(self.mask(p)) for p in some], in_8bit, *rest)

    def _update_dense(self, params: Sequence[Tensor], in_8bit: bool, *rest: Any) -> None:
        together = [p for p in params if local(p).numel() < _SMALL and not in_8bit]
        for some in self._lots([p for p in params if in_8bit or local(p).numel() >= _SMALL], in_8bit):
            self._run(update_, self._columns(some), [None] * len(some), in_8bit, *rest)
        if together:
            columns = self._columns(together)
            whole = [torch.cat(column) for column in columns]
            self._run(update_, [[tensor] for tensor in whole], [None], in_8bit, *rest)
            sizes = [weight.numel() for weight in columns[0]]
            for i in (0, 2, 3):
                torch._foreach_copy_(columns[i], torch.split(whole[i], sizes))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with masks and codes exactly as they were saved. Raises `InputError` when what may not change
        does."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            changed = [f"{k} {saved.get(k)} -> {group[k]}" for k in EXACT_ON_RESUME if saved.get(k) != group[k]]
            if changed:
                raise InputError(f"the saved optimizer state is of another run ({', '.join(changed)}): use its values")
        dtypes = {param: {key: value.dtype for key, value in state.items()} for param, state in self.state.items()}
        super().load_state_dict(state_dict)
        for param, state in self.state.items():  # torch casts state to the parameter's dtype, in which all of it fits
            for key, dtype in dtypes[param].items():
                state[key] = state[key].to(dtype)
