"""The interface of a training method: its changes to the model, the gradient and the masks.

Data, teacher, token budget, seed and schedule belong to the loop and are the same for every method.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.adams import AdamS
from castlm.core.nm import Pattern
from castlm.core.rounding import SCALE_RATE, add_weight_rounding
from castlm.core.sparsify import (
    FilterFn,
    SparseLayer,
    dense_name,
    magnitude_masks,
    scope_of,
    sparse_param_groups,
    weight_parameter,
)
from castlm.facts import Facts
from castlm.methods.options import AdapterOptions, MethodOptions, OptimizerOptions
from castlm.methods.table import METHODS, Step0
from castlm_runtime.formats import FORMATS


class _StraightThrough(torch.autograd.Function):
    """`weight * mask` whose gradient reaches every weight (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask  # (1536, 576), zeros where masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # as if the mask were the identity, so masked weights keep learning


class ForwardMask(nn.Module):
    """A parametrization of a weight (out, in): the forward pass sees zeros where it is masked.

    The gradient reaches masked weights if `passes_gradient`, and is zero there otherwise.
    """

    def __init__(self, mask: Tensor, passes_gradient: bool = True) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor
        self.passes_gradient = passes_gradient

    def forward(self, weight: Tensor) -> Tensor:
        if not self.passes_gradient:
            return weight * self.mask
        masked: Tensor = _StraightThrough.apply(weight, self.mask)
        return masked


class Retraining:
    """One way to train a model to n:m.

    The loop sets the learning rate, calls `before_forward` and `before_update` at each step, and steps `optimizer`.

    Args:
        start: `init_from` of the run: magnitude, a one-shot solver, or an n:m model.
        seed: seed of the random choices of the method.

    Attributes:
        optimizer: AdamS over all parameters; dense groups are plain Adam. Available after `build_optimizer`.
        layers: the sparse layers by name; empty for the dense control.
        left_dense: the reason by the name of each layer that stays dense.
    """

    optimizer_class = AdamS  # a subclass has another update rule
    whole_copies = False  # whether each rank holds a whole copy of the model
    masks_forward = True  # whether the forward pass multiplies by the mask
    passes_gradient = True  # whether the gradient then reaches masked weights
    mask_interval: int = 0  # steps between refreshes of the masks, in the forward pass or in AdamS; 0: never

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        filter_fn: FilterFn,
        *,
        method: MethodOptions,
        optimizer: OptimizerOptions,
        adapter: AdapterOptions,
        start: str,
        seed: int,
    ) -> None:
        scope = scope_of(model, pattern, filter_fn)
        self.pattern, self.filter_fn = scope.pattern, filter_fn
        self.layers, self.left_dense = scope.layers, scope.left_dense
        self.options, self.optimizer_options, self.adapter = method, optimizer, adapter
        self.start, self.seed = start, seed
        self._flips: Tensor | int = 0
        self.parametrize_(model)

    @property
    def decays(self) -> bool:
        """Whether AdamS decays the masked weights."""
        return self.options.row.decays

    @property
    def step0(self) -> Step0:
        """The model at step 0: dense, sparse or sparse with masked weights that are trained on from zero."""
        return self.options.step0(self.start)

    @classmethod
    def check(cls, method: MethodOptions, optimizer: OptimizerOptions) -> None:
        """Raises `InputError` for options with which the run could not end in n:m masks."""

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        """Builds the optimizer over all parameters of the model, after `prepare` and after sharding."""
        groups = sparse_param_groups(model, self.pattern, self.filter_fn)
        if not self.decays:  # AdamS masks nothing: every group is plain Adam
            groups = [{**group, "sparse": False} for group in groups]
        return self.optimize(groups, fused)

    def optimize(self, groups: list[dict[str, Any]], fused: bool) -> AdamS:
        """Builds the optimizer over groups of parameters with their `param_names`."""
        options, optimizer = self.options, self.optimizer_options
        if options.weight_bits:
            groups = [part for group in groups for part in self._with_scales_apart(group)]
        if optimizer.weight_decay:
            groups = [part for group in groups for part in self._with_weight_decay(group)]
        self.optimizer = self.optimizer_class(
            groups,
            lr=optimizer.learning_rate,  # type: ignore[arg-type]  # a run has filled the default in by now
            betas=optimizer.adam_betas,
            lam=options.lam or 0.0,  # type: ignore[arg-type]  # a run has measured "auto" by now
            total_steps=optimizer.max_steps,
            mask_interval=self.mask_interval,
            decay=options.decay,
            decay_end=options.decay_end,  # type: ignore[arg-type]  # a config has filled it in
            second_moment=optimizer.second_moment,
            moments=optimizer.moments,
            moments_on_host=optimizer.moments_on_host,
            fused=fused,
        )
        return self.optimizer

    def _with_scales_apart(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Splits a group in two: the scales of trained rounding, with a learning rate of their own, and others."""
        rate: float = self.optimizer_options.learning_rate  # type: ignore[assignment]  # filled in by now
        parts: dict[bool, list[tuple[Tensor, str]]] = {False: [], True: []}
        for p, name in zip(group["params"], group["param_names"]):
            parts[name.endswith(".log_scale")].append((p, name))
        return [
            {
                **group,
                "params": [p for p, _ in part],
                "param_names": [name for _, name in part],
                "rate_factor": SCALE_RATE / rate if of_scales else 1.0,
            }
            for of_scales, part in parts.items()
            if part
        ]

    def _with_weight_decay(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Splits a group in two: dense weight matrices with weight decay, and all other parameters without."""
        sparse = {weight_parameter(layer) for layer in self.layers.values()}
        decayed: list[tuple[Tensor, str]] = []
        others: list[tuple[Tensor, str]] = []
        for p, name in zip(group["params"], group["param_names"]):
            # AdamW's habit: norms, biases and scales are not pulled to zero. Sparse weights have the decay of AdamS.
            is_matrix = p.dim() > 1 and "parametrizations" not in dense_name(name) and not name.endswith("bias")
            part = decayed if is_matrix and p not in sparse else others
            part.append((p, name))
        return [
            {**group, "params": [p for p, _ in part], "param_names": [n for _, n in part], "weight_decay": decay}
            for part, decay in ((decayed, self.optimizer_options.weight_decay), (others, 0.0))
            if part
        ]

    def parametrize_(self, model: nn.Module) -> None:
        """Prepares the model before it is sharded, and adds trained rounding where the run has it."""
        self.prepare(model)
        if bits := self.options.weight_bits:
            # Last, so that it rounds W * A, the weight that will be stored.
            add_weight_rounding(model, bits, FORMATS[f"int{bits}"].group)

    def prepare(self, model: nn.Module) -> None:
        """Parametrizes the model before it is sharded: with weight scaling, or with a mask in the forward pass."""
        for layer, mask in self.magnitude_masks().items():
            # unsafe: torch would run the module once to compare shape and dtype, which are the weight's own.
            parametrize.register_parametrization(layer, "weight", ForwardMask(mask, self.passes_gradient), unsafe=True)

    def magnitude_masks(self) -> dict[SparseLayer, Tensor]:
        """The mask by magnitude of the rows of every sparse layer that this rank holds."""
        weights = {name: weight_parameter(layer) for name, layer in self.layers.items()}
        return {self.layers[name]: mask for name, mask in magnitude_masks(weights, self.pattern)}

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Inside the context, every mask of the forward pass is True, so that it computes the dense model."""
        layers = list(self.layers.values()) if self.masks_forward else []
        # bool, one byte a weight while the dense model is measured
        masks = [forward_mask(layer).clone() for layer in layers]
        for layer in layers:
            forward_mask(layer).fill_(True)
        try:
            yield
        finally:
            for layer, mask in zip(layers, masks):
                forward_mask(layer).copy_(mask)

    def start_from_magnitude_(self) -> None:
        """Prunes by magnitude at step 0, if the method begins with masked weights at zero. By default does nothing."""

    def start_layer_(self, layer: SparseLayer, weight: Tensor, mask: Tensor) -> None:
        """Sets the weight and the mask (rows of this rank, in) of a layer at step 0, with masked weights at zero."""
        weight_parameter(layer).copy_(weight)
        forward_mask(layer).copy_(mask)

    def before_forward(self, step: int) -> None:
        """Refreshes the masks of the forward pass. Called at the top of each step, before the passes."""
        if self.masks_forward and self.mask_interval and step % self.mask_interval == 0:
            self.set_masks(self.magnitude_masks())

    @torch.no_grad()
    def set_masks(self, new: Mapping[SparseLayer, Tensor]) -> None:
        """Replaces masks; a method with a rule of its own calls it in `before_forward`.

        Args:
            new: by layer, bool, True = kept, shaped like the rows of its weight that this rank holds.
        """
        # Counted on the device; `flips` reads the number when the logs need it.
        flips = [(mask != forward_mask(layer)).sum() for layer, mask in new.items()]
        self._flips = torch.stack(flips).sum() if flips else 0
        for layer, mask in new.items():
            forward_mask(layer).copy_(mask)

    def flips(self) -> int:
        """Number of mask entries on this rank that the last refresh changed."""
        return int(self._flips)

    @property
    def fixed_figures(self) -> frozenset[str]:
        """The figures of an evaluation that cannot change during this run."""
        changes_masks = self.mask_interval or type(self).before_forward is not Retraining.before_forward
        flips = () if changes_masks else ("flip_rate", "initial_flip_rate")
        return frozenset(flips) | ({"prune_now_ppl"} if self.masks_forward else frozenset())

    def set_flips(self, flips: int) -> None:
        """Sets what `flips` returns until the next refresh, after a resume."""
        self._flips = flips

    def before_update(self, step: int, parameters: Iterable[Tensor]) -> None:
        """Changes the gradients of `parameters`, which are whole and clipped.

        It is called once in a step for all parameters, or part by part, see `castlm.training.in_backward`.
        """

    def own_parameters(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Returns the parameters of the model itself, without those that the method has added; by default all."""
        return list(parameters)

    def trained_part(self, parameters: Iterable[Tensor]) -> str:
        """A clause for the first lines of a run if only a part of `parameters` is trained; by default empty."""
        return ""

    def save_parts(self, folder: Path, facts: Facts) -> None:
        """Writes further results of the method, such as an adapter, into the output folder. The main rank calls it.

        Args:
            facts: of the run, for their card.
        """

    def fold_(self) -> None:
        """Merges further trained parameters, such as an adapter, into the weights after training."""

    def masks(self) -> dict[Tensor, Tensor]:
        """The mask of every sparse parameter, True = kept."""
        return {weight_parameter(layer): forward_mask(layer) for layer in self.layers.values()}

    def tensors(self) -> dict[str, Tensor]:
        """State that a checkpoint holds beside the parameters and the optimizer's state."""
        # A mask is up to `mask_interval` steps old, so it cannot be computed from the weights.
        return {f"mask.{name}": forward_mask(layer) for name, layer in self.layers.items()}


def forward_mask(layer: SparseLayer) -> Tensor:
    """The mask of a layer that `Retraining.prepare` parametrized: (out, in), bool, True = kept."""
    mask: Tensor = layer.get_buffer("parametrizations.weight.0.mask")
    return mask


def class_of(method: str, adapter: str) -> type[Retraining]:
    """Imports the class that trains with `method` of `METHODS`: the whole model, or an adapter of it."""
    row = METHODS[method]
    module, name = (row.module, row.class_name) if adapter == "none" else _ADAPTER
    found: type[Retraining] = getattr(importlib.import_module(module), name)
    return found


_ADAPTER = ("castlm.methods.adapters", "FinetuneAdapter")
