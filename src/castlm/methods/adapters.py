"""Sparse models in other training loops, and PEFT adapters whose merge keeps every zero of them.

`keep_pattern_` guards the zeros of a model under any optimizer, and `PatternCallback` calls it in a `Trainer`. The
merge of plain LoRA adds a dense matrix to the weight, which fills its zeros. SHiRA (Bhardwaj et al. 2024, arXiv
2406.13175) trains single weights at fixed positions; here these are positions that the pattern keeps. PEFT saves the
positions with the adapter, so it loads and merges the adapter without castlm.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.keep import KeptPattern
from castlm.core.nm import Pattern
from castlm.core.shards import local, sum_over_shards
from castlm.core.sparsify import FilterFn, SparseLayer, check_model, filter_for, scope_of, weight_parameter
from castlm.export.card import adapter_card
from castlm.export.folder import left_dense_reason, read_left_dense
from castlm.facts import Facts
from castlm.files.output import atomic_dir
from castlm.methods.finetune import Finetune
from castlm.packages import require

if TYPE_CHECKING:
    from peft import ShiraConfig


def keep_pattern_(model: nn.Module, pattern: Pattern | str = "2:4", filter_fn: FilterFn | None = None) -> KeptPattern:
    """Keeps every zero of the sparse layers of `model` at zero under any optimizer, in place.

    Call it once, before training; where `fully_shard` is used, after it. The zeros that the weights have now get no
    gradient, and so no moments, and are counted after each optimizer step. A copy of the model is not guarded.

    Args:
        model: n:m sparse; a transformers model, or one with PEFT adapters.
        pattern: the pattern that the sparse layers must already have.
        filter_fn: `filter_fn(module, fqn)` says which linear layers are sparse. By default all layers inside the
            transformer blocks, except those listed as left dense in the castlm.json of the model's folder.

    Returns:
        The guard. `check()` counts the zeros at any other time, and `remove()` ends it.

    Raises:
        InputError: a layer that does not have the pattern, or whose weight is flattened or sharded across its groups;
            experts or a GPT-2 that were not loaded by `castlm.load_model`, which makes linear layers of them. Later, at
            the optimizer step that breaks the pattern: the tensor and the number of weights.

    Examples:
        >>> import castlm
        >>> layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        >>> model = nn.ModuleDict({"layers": layers})
        >>> _ = castlm.prune_(model)
        >>> kept = castlm.keep_pattern_(model)
        >>> kept.masks()["layers.0"].float().mean()
        tensor(0.5000)
    """
    return KeptPattern(pattern_layers(model, pattern, filter_fn))


def pattern_layers(
    model: nn.Module, pattern: Pattern | str, filter_fn: FilterFn | None = None
) -> dict[str, SparseLayer]:
    """The layers of a model that have the pattern, by their names in the base model; see `keep_pattern_`."""
    check_model(model)
    adapters: set[str] = set()  # the modules that belong to adapters and not to the base model
    for name, adapted in _adapted_layers(model).items():
        inside = {inner for inner, _ in adapted.named_modules(prefix=name)} - {name}
        # PEFT wraps a layer: `up_proj.base_layer` is the model's own, all else inside `up_proj` is the adapter's.
        adapters |= {inner for inner in inside if not f"{inner}.".startswith(f"{name}.base_layer.")}
    folder = getattr(getattr(model, "config", None), "name_or_path", "")  # that the model was loaded from
    left_dense = read_left_dense(Path(folder)) if folder and Path(folder).is_dir() else {}

    chooses = filter_for(model)

    def is_sparse(module: nn.Module, fqn: str) -> bool:
        if fqn in adapters:
            return False
        if filter_fn is not None:
            return filter_fn(module, fqn)
        return chooses(module, fqn) and left_dense_reason(f"{plain_name(fqn)}.weight", left_dense) is None

    scope = scope_of(model, pattern, is_sparse)
    parameters = dict(model.named_parameters())
    for name in scope.left_dense:
        weight = parameters.get(name)
        if weight is not None and weight.dim() == 3 and 4 * int(weight.count_nonzero()) < 3 * weight.numel():
            raise InputError(
                f"{name} holds sparse experts in a 3-D parameter: call castlm.linearize_experts_(model) first, before "
                "the optimizer is made, or load the model with castlm.load_model"
            )
    named = {plain_name(fqn): layer for fqn, layer in scope.layers.items()}
    _check_pattern(named, scope.pattern)
    return named


def _check_pattern(layers: Mapping[str, SparseLayer], pattern: Pattern) -> None:
    """Raises `InputError` unless all weights of `layers` have the pattern. Under FSDP2 all ranks call it."""
    weights = {name: weight_parameter(layer).detach() for name, layer in layers.items()}
    if any(weight.dim() < 2 for weight in weights.values()):
        return  # `KeptPattern` says why it cannot keep them
    for weight in weights.values():
        pattern.check_placement(weight)
    counts = [
        torch.tensor(pattern.at(name).violations(local(weight)), device=weight.device)
        for name, weight in weights.items()
    ]
    totals = sum_over_shards(list(weights.values()), counts)
    violating = {name: total for name, total in zip(weights, totals) if total}
    if violating:
        first, num_places = next(iter(violating.items()))
        raise InputError(
            f"{len(violating)} of {len(weights)} layers are not {pattern}, first {first} with {num_places:,} "
            "places that hold more non-zeros: prune the model first (castlm prune), or exclude layers that are dense "
            "on purpose with filter_fn"
        )


def plain_name(fqn: str) -> str:
    """The name in the base model of a layer such as `base_model.model.model.layers.0.mlp.up_proj.base_layer`."""
    return fqn.removeprefix("base_model.model.").removesuffix(".base_layer")


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has wrapped with an adapter, by their name in `model`; empty if PEFT is not imported."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}  # type: ignore[misc]


def shira_config(
    model: nn.Module,
    r: int = 16,
    *,
    pattern: Pattern | str = "2:4",
    filter_fn: FilterFn | None = None,
    random_seed: int = 0,
    **options: Any,
) -> ShiraConfig:
    """A `peft.ShiraConfig` for a sparse model, whose adapter trains kept weights and therefore keeps every zero.

    `peft.get_peft_model(model, config)` adds the adapter; PEFT saves, loads and merges it on its own. SHiRA (arXiv
    2406.13175) trains single weights at fixed positions; here they are drawn from those that are kept.

    Args:
        r: size of the adapter. Each layer (out, in) trains r * (out + in) of its kept weights, as many parameters as
            LoRA of rank r has, and at most all of them.
        pattern: as for `keep_pattern_`.
        filter_fn: as for `keep_pattern_`.
        random_seed: seed with which the positions are drawn.
        options: further fields of `ShiraConfig`.

    Raises:
        InputError: peft is not installed, the model is not n:m sparse, or r is larger than the smallest layer allows.

    Examples::

        config = castlm.shira_config(model, r=16)
        peft_model = peft.get_peft_model(model, config)
        ...  # train
        peft_model.save_pretrained("adapter")
        model = peft_model.merge_and_unload()
    """
    peft = _peft()
    found = pattern_layers(model, pattern, filter_fn)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}  # PEFT adapts no experts
    kept = {name: int(layer.weight.count_nonzero()) for name, layer in layers.items()}
    per_rank = {name: sum(layer.weight.shape) for name, layer in layers.items()}
    tightest = min(layers, key=lambda name: kept[name] // per_rank[name])
    if r * per_rank[tightest] > kept[tightest]:
        at_most = kept[tightest] // per_rank[tightest]
        raise InputError(
            f"r = {r} asks for {r * per_rank[tightest]:,} weights of {tightest}, which keeps {kept[tightest]:,}: "
            + (f"use r <= {at_most} (lora_r of castlm finetune), or " if at_most else "")
            + "train all kept weights, without an adapter"
        )
    generator = torch.Generator().manual_seed(random_seed)

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        """The trained positions of a layer: r * (out + in) of the kept ones."""
        weight = base_layer.get_parameter("weight")
        kept = weight.detach().flatten().nonzero().squeeze(1).cpu()  # (442368,) positions in (1536, 576) at 2:4
        # r = 16: 16 x (1536 + 576) = 33,792 of them
        chosen = kept[torch.randperm(len(kept), generator=generator)[: r * sum(weight.shape)]]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        return mask.view(weight.shape).to(weight.device)

    config = peft.ShiraConfig(r=r, target_modules=list(layers), **options)
    config.mask_fn = mask_fn
    return config  # type: ignore[no-any-return]


def _check_adapters(model: nn.Module, kept: KeptPattern) -> None:
    """Raises `InputError` if an adapter of `model` would fill zeros of a layer in `kept` when it is merged."""
    adapted = {plain_name(fqn): layer for fqn, layer in _adapted_layers(model).items()}
    adapted = {name: layer for name, layer in adapted.items() if name in kept.weights}
    if not adapted:
        return
    from peft.tuners.shira.layer import ShiraLayer

    masks = kept.masks()
    for name, layer in adapted.items():
        mask = masks[name]
        keeps_zeros = isinstance(layer, ShiraLayer) and all(
            mask[tuple(positions.long().to(mask.device))].all() for positions in layer.shira_indices.values()
        )
        if not keeps_zeros:
            raise InputError(
                f"the {type(layer).__name__} adapter of {name} fills the zeros of a sparse layer when it is merged: "
                "make its config with castlm.shira_config(model)"
            )


def _peft() -> Any:
    require("adapters need", "peft", install="'.[peft]' in the clone of castlm")
    import peft

    return peft


class FinetuneAdapter(Finetune):
    """SHiRA on kept positions of a frozen model that is already n:m.

    Before the merge, PEFT saves the adapter in `adapter/` in the output folder.
    """

    whole_copies = True  # PEFT's forward pass indexes whole weights, which a rank with some rows does not have

    def prepare(self, model: nn.Module) -> None:
        config = shira_config(
            model, self.adapter.lora_r, pattern=self.pattern, filter_fn=self.filter_fn, random_seed=self.seed
        )
        self._masks = {weight_parameter(layer): layer.weight.detach() != 0 for layer in self.layers.values()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(self.seed)
            warnings.simplefilter("ignore")  # transformers warns about its own code
            torch.sparse_coo_tensor(torch.zeros(2, 1), torch.zeros(1), (1, 1))  # torch warns about sparse tensors once
            self.peft_model = _peft().get_peft_model(model, config)  # replaces layers of `model` in place

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        self._masks = {p: mask.to(p.device) for p, mask in self._masks.items()}  # the model has moved since `prepare`
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        group = {"params": [p for _, p in named], "param_names": [name for name, _ in named], "sparse": False}
        return self.optimize([group], fused)

    def start_layer_(self, layer: SparseLayer, weight: Tensor, mask: Tensor) -> None:
        """Does nothing: training starts from the model as it is."""

    def own_parameters(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [parameter for parameter in parameters if not parameter.requires_grad]

    def trained_part(self, parameters: Iterable[Tensor]) -> str:
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return f", adapter {self.adapter.adapter} of {trained:,} weights"

    def save_parts(self, folder: Path, facts: Facts) -> None:
        with atomic_dir(folder / "adapter", overwrite=True) as temporary:
            self.peft_model.save_pretrained(temporary)
            trained = sum(p.numel() for p in self.peft_model.parameters() if p.requires_grad)
            card = adapter_card(facts, self.adapter.adapter, trained)
            (temporary / "README.md").write_text(card, encoding="utf-8")

    def fold_(self) -> None:
        self.peft_model.merge_and_unload()


class PatternCallback(TrainerCallback):
    """Keeps an n:m sparse model n:m sparse in a `transformers.Trainer`, with any of its optimizers.

    During `train()`, `castlm.keep_pattern_` guards the model: masked weights stay exactly zero, and a step that breaks
    the pattern raises. A PEFT adapter whose merge would fill the zeros raises before the first step.

    Args:
        pattern: as for `castlm.keep_pattern_`.
        filter_fn: as for `castlm.keep_pattern_`.

    Raises:
        InputError: at the start of `train()`: as `keep_pattern_`, and for DeepSpeed, FSDP1, and plain LoRA on a sparse
            layer; during training: a step that breaks the pattern.

    Examples::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[castlm.PatternCallback()])
        trainer.train()
    """

    def __init__(self, pattern: Pattern | str = "2:4", filter_fn: FilterFn | None = None) -> None:
        self.pattern, self.filter_fn = pattern, filter_fn
        self.kept: KeptPattern | None = None
        """The guard of the run in progress, or of the last one."""
        self._checks_before = 0

    def on_train_begin(self, args: TrainingArguments, *_: Any, **parts: Any) -> None:
        engine = None
        if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            engine = "DeepSpeed"
        elif args.fsdp and int((args.fsdp_config or {}).get("version", 2)) == 1:  # type: ignore[union-attr]
            engine = "FSDP1"  # if `accelerate launch` chose it, `KeptPattern` finds the flat weights
        if engine:
            raise InputError(
                f"{engine} flattens the weights, which have no pattern then: use DDP, or fsdp_config {{'version': 2}}"
            )
        if self.kept is not None:  # an earlier run failed before `on_train_end`
            self.kept.remove()
        self.kept = keep_pattern_(parts["model"], self.pattern, self.filter_fn)
        _check_adapters(parts["model"], self.kept)

    def on_step_begin(self, *_: Any, **parts: Any) -> None:
        assert self.kept is not None
        self._checks_before = self.kept.num_checks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **parts: Any) -> None:
        assert self.kept is not None
        if self.kept.num_checks == self._checks_before:  # the optimizer is not torch's, or holds only adapters
            self.kept.check(f"step {state.global_step}")

    def on_train_end(self, *_: Any, **parts: Any) -> None:
        """Checks once more, because `load_best_model_at_end` loads other weights, and ends the guard."""
        assert self.kept is not None
        self.kept.check("training")
        self.kept.remove()
