"""Cuts channels or heads out of a model: the result is a smaller dense model that loads anywhere as it is.

The units are chosen and set to zero block by block (`prune_units.py`). A unit whose weights are zero adds nothing to
the residual stream, so removing it changes the output only by rounding in shorter sums. Every cut measures that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer, filter_for, transformer_blocks
from castlm.data.calibration import CalibrationText, Extras
from castlm.facts import Cut
from castlm.models.architecture import check_of_transformers, context_length, eval_mode, linearize_
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.run import run_start
from castlm.oneshot.source import MemoryModel
from castlm.say import Progress, Say, silent
from castlm.structured.prune_units import PruneUnits
from castlm.structured.scores import SCORES
from castlm.structured.units import DEFAULT_SCORE, Units, expand, number_in, sizes_after, sizes_of, sums

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, between the masked model and the one that is cut, in
fp32."""
_PROBE_TOKENS = 64


def cut_units(
    model: PreTrainedModel,
    units: Units | str,
    score: str | None = None,
    *,
    calibration: Tensor | None = None,
    extras: Extras = None,
    refits: bool = True,
    precision: str = "fp32",
    say: Say = silent,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, Cut, OneshotReport]:
    """Cuts a share of the MLP channels or attention heads out of a model, without training.

    The result is trained on like any dense model, best with the large one as teacher.

    Args:
        model: a dense model of transformers. The units that it loses are zero in it afterwards; load it again where it
            is needed whole, as for a teacher.
        units: `Units` or a text, such as "channels:0.5" or "heads:0.5", with the share that stays in every transformer
            block.
        score: the score by which units are ranked, a name in `castlm.structured.scores.SCORES`; by default "flap" for
            channels and "taylor" for heads. "taylor" holds the gradient of every weight of a unit.
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`; not needed by "magnitude".
        extras: for each sequence, the further arguments of the model's forward, such as images.
        refits: solve for the kept weights of the output layers by least squares on `calibration`.
        precision: see `castlm.data.calibration.CalibrationText`.
        say: as for `castlm.oneshot.run.run_start`.
        progress: as for `castlm.oneshot.run.run_start`.

    Returns:
        The smaller model, in the dtype and on the device of `model`; the sizes before and after; and the errors of the
        output layers.

    Raises:
        InputError: other units, a family without a config for the smaller model, a share that keeps all units or none,
            a number of heads that the family's config does not allow, a score without its text, or NaN.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> small, cut, report = cut_units(model, "channels:0.5", calibration=tokens)  # doctest: +SKIP
    """
    check_of_transformers(model)
    units = Units.parse(units)
    layers = check_cut(model, units)
    text = None if calibration is None else CalibrationText(calibration, extras, precision)
    if text is not None:
        text.check(len(model.get_input_embeddings().get_parameter("weight")))
    step = PruneUnits(score_of(units, score), units, refits)
    report = run_start(MemoryModel(model, layers), [step], text, say=say, progress=progress)
    small, cut = without_zero_units(model, units)
    return small, cut, report


def score_of(units: Units, score: str | None) -> str:
    """`score`, or the default of the units; raises `InputError` for a name that is not in `SCORES`."""
    score = score or DEFAULT_SCORE[units.kind]
    if score not in SCORES:
        raise InputError(f"score {score!r} does not rank {units.kind}: choose one of {', '.join(SCORES)}")
    return score


def check_cut(model: PreTrainedModel, units: Units) -> dict[str, SparseLayer]:
    """Checks that `units` can be cut out of `model`; returns the layers that hold them.

    Raises:
        InputError: as `cut_units`.
    """
    _config_after(model, units)
    chooses = filter_for(model)
    linear = {name: module for name, module in model.named_modules() if chooses(module, name)}
    groups = units.layers(linear)
    num_blocks = len(transformer_blocks(model))
    if len(groups) != num_blocks:
        raise InputError(
            f"units {units}: {len(groups)} of the {num_blocks} transformer blocks have linear layers that hold "
            f"{units.kind}, and one config must describe all blocks: castlm cannot cut {type(model).__name__}"
        )
    if type(model).__module__.startswith("transformers_modules"):
        raise InputError(f"units {units} cannot be cut out of a model with code of its own")
    return {name: linear[name] for names in groups for name in names}


def _config_after(model: PreTrainedModel, units: Units) -> PretrainedConfig:
    """The config of the model that is cut; raises `InputError` if transformers refuses it, with shares that fit."""
    sizes = sizes_of(units, model.config.to_dict())
    after = sizes_after(units, sizes)
    config = _with_sizes(model.config, after)
    if (reason := _refusal(config)) is None:
        return config
    field, number = number_in(sizes)
    assert units.kind == "heads"  # configs restrict no size but the number of heads
    others = {k: _with_sizes(model.config, sizes_after(Units("heads", k / number), sizes)) for k in range(1, number)}
    fitting = [k for k, other in others.items() if _refusal(other) is None]
    shares = ", ".join(f"heads:{k / number:.3g}" for k in fitting) or "channels:0.5"
    raise InputError(
        f"units {units} leave {after[field]} of {number} KV heads, and transformers has no "
        f"{model.config.model_type} of that size ({reason}): use {shares}"
    )


def _with_sizes(config: PretrainedConfig, sizes: Mapping[str, int]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def _refusal(config: PretrainedConfig) -> str | None:
    """The reason why transformers refuses a config; None if it accepts it."""
    try:
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        return str(error.__cause__ or error).strip().splitlines()[-1]
    return None


@torch.no_grad()
def without_zero_units(model: PreTrainedModel, units: Units) -> tuple[PreTrainedModel, Cut]:
    """Returns a new model without the units of `model` that are zero, with a config of the new sizes.

    Raises:
        InputError: as `check_cut`, or the logits differ by more than `TOLERANCE` (fp32), because a unit was not zero.
    """
    layers = check_cut(model, units)
    before = sizes_of(units, model.config.to_dict())
    _, num_units = number_in(before)
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced
        small = AutoModelForCausalLM.from_config(_config_after(model, units), dtype=model.dtype)
    linearize_(small)
    state = model.state_dict()
    for names in units.layers(layers):
        weights = [layers[name].weight for name in names]
        # the units with the largest norms are those that are not zero
        kept = units.best(sums([weight.float().square() for weight in weights], num_units))
        for name, mask in zip(names, expand(kept, weights)):
            rows, columns = mask.any(1), mask.any(0)  # of down (576, 1536): all 576 rows, the 768 kept columns
            state[f"{name}.weight"] = state[f"{name}.weight"][rows][:, columns].clone()
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][rows].clone()
    small.load_state_dict(state)
    del state
    small = small.to(model.device)
    small.generation_config = copy.deepcopy(model.generation_config)
    moved = _logits_moved(model, small)
    if model.dtype == torch.float32 and not moved <= TOLERANCE:
        raise InputError(f"cutting {units} out moves the logits by {moved:.1g} of the largest: a lost unit is not zero")
    return small, Cut(str(units), before, sizes_after(units, before), moved)


def _logits_moved(model: PreTrainedModel, small: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_TOKENS, context_length(model.config) or _PROBE_TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)

    def logits(of_model: PreTrainedModel) -> Tensor:
        with eval_mode(of_model):
            output: Any = of_model(input_ids=ids, use_cache=False)
        scores: Tensor = output.logits.float()
        return scores

    whole = logits(model)
    return float((logits(small) - whole).abs().max() / whole.abs().max())
