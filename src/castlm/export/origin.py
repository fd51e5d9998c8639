"""The origin of a model: its base model and licence, and the steps by which castlm made it, through all commands.

A result names its base model on the hub and its licence in castlm.json, and a later command carries both on. The entry
`earlier` lists the steps before the last one, so that the card of a fine-tuned model tells how its zeros were made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.export.folder import read_facts
from castlm.facts import Facts, Origin, PastStep, Quantized
from castlm.methods.table import METHODS
from castlm.models.locate import DEMO, Location, cached_snapshot, locate

SOLVER_TITLES = {
    "magnitude": "magnitude",
    "wanda": "Wanda (arXiv 2306.11695)",
    "sparsegpt": "SparseGPT (arXiv 2301.00774)",
    "flap": "FLAP's score (arXiv 2312.11983)",
    "taylor": "the first-order Taylor score",
}
"""The one-shot solvers in the words of a card; one of your own has its name."""
_HUB = "https://huggingface.co/"
_REFINED = {"mask_iterations": "masks by ADMM", "refit_iterations": "refitted kept weights"}
"""The refinements that make other masks or weights than the published SparseGPT, in words."""
_STEP = tuple(entry.name for entry in fields(PastStep) if entry.name not in ("config", "quantized", "changes_of_basis"))
"""The entries of castlm.json that describe the step that made a model."""
_OF_CONFIG = ("init_from", "model", "seq_len", "eta", "teacher", "adapter", "start_effort", *_REFINED)
"""The options of a run that describe its step."""


def origin_of(name: str | Path, revision: str | None = None) -> Origin:
    """The entries of castlm.json that a result takes over from the model `name`.

    The base model of a result of castlm is that result's own. The licence is the one in the card of a folder or of a
    hub model in the cache, or in the header of a GGUF file; None if none names one.
    """
    where = locate(name, needs_weights=False)
    if where.gguf:
        return Origin(*_of_gguf(where))
    folder = cached_snapshot(where.target, revision) if where.is_hub else Path(where.target)
    source = where.source if revision is None else f"{where.source}@{revision}"
    if folder is None:
        return Origin(source)
    facts, licence = read_facts(folder), license_of_card(folder)
    if not facts.base_model:
        return Origin(source if where.is_hub else _as_path(source), licence)
    return Origin(facts.base_model, facts.license or licence, made_by(facts) or None)


def origin_in_memory(model: PreTrainedModel) -> Origin:
    """`origin_of` the folder or hub model that `model` was loaded from, by the name in its config; without any entry if
    that is neither a folder nor in the cache of the hub."""
    name = model.config.name_or_path
    if not name:
        return Origin()
    try:
        where = locate(name, needs_weights=False)
    except InputError:  # a folder that is gone
        return Origin()
    is_known = not where.is_hub or cached_snapshot(where.target, None) is not None
    return origin_of(name) if is_known else Origin()


def _as_path(source: str) -> str:
    """A local path that nobody takes for a hub id, which `runs/base` could be in another folder."""
    return source if source.startswith(("/", "~", ".")) else f"./{source}"


def made_by(facts: Facts) -> list[PastStep]:
    """The steps that made a model, oldest first, from its castlm.json: `earlier`, and its own."""
    steps = list(facts.earlier or [])
    if facts.method:
        config = {name: value for name, value in (facts.config or {}).items() if name in _OF_CONFIG}
        basis = facts.basis or facts.start.basis
        changes = [change.what for change in basis.changes if change.num_kept] if basis else None
        own = {name: getattr(facts, name) for name in _STEP}
        steps.append(PastStep(**own, config=config, changes_of_basis=changes or None))
    if facts.quantized is not None:
        steps.append(PastStep(quantized=Quantized(kind=facts.quantized.kind, text=facts.quantized.text)))
    return steps


def license_of_card(folder: Path) -> str | None:
    """The licence in the head of a model's README.md."""
    file = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---\n", file.read_text("utf-8", "replace"), re.S) if file.is_file() else None
    try:
        fields = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:  # a card of others
        return None
    found = fields.get("license") if isinstance(fields, dict) else None
    return found if isinstance(found, str) else None


def _of_gguf(where: Location) -> tuple[str, str | None]:
    """The base model and the licence of a GGUF file, by its header."""
    from castlm.models.gguf import forget_gguf, read_fields

    places = ("general.repo_url", "general.source.repo_url")
    found = read_fields(Path(where.target) / where.gguf["gguf_file"], "general.license", *places)
    forget_gguf()
    hub_ids = [found[name].removeprefix(_HUB) for name in places if found.get(name, "").startswith(_HUB)]
    source = where.source if where.name == DEMO else _as_path(where.source)
    if hub_ids and where.name != DEMO:
        source = f"{hub_ids[0]} ({where.gguf['gguf_file']})"
    return source, found.get("general.license")


def described(step: PastStep, shown: Callable[[str], str] = str) -> str:
    """A step in words, for the card.

    Args:
        shown: a name of a text or model in the form in which the card shows it.
    """
    if (quantized := step.quantized) is not None:
        calibrated = f", calibrated on {shown(quantized.text)}" if quantized.text else ""
        return f"Rounded to {quantized.kind}{calibrated}"
    config, method = step.config or {}, str(step.method)
    if step.train_steps is None:
        text = step.calibration
        drawn = (
            f"{text.num_sequences:,} sequences of {text.seq_len:,} tokens of {shown(text.text or '')}" if text else ""
        )
        calibrated = f", calibrated on {drawn}" if text else ""
        refined = _refined(step.refinements or {})
        refined += _in_basis(step)
        if step.cut is not None:
            return f"Cut to {step.cut.units} by {SOLVER_TITLES.get(method, method)}{calibrated}, without training"
        return f"Pruned one-shot by {SOLVER_TITLES.get(method, method)}{refined}{calibrated}, without training"
    steps = "1 step" if step.train_steps == 1 else f"{step.train_steps:,} steps"
    tokens = f"{step.train_tokens or 0:,} tokens"
    names = (step.dataset.name if step.dataset else "a text").split(" + ")
    batch = "1 sequence" if step.world_batch == 1 else f"{step.world_batch or '?'} sequences"
    length = f"{batch} of {config.get('seq_len', '?')} tokens"
    amount = f"{steps} of {length}, {tokens} of {' and '.join(map(shown, names))}"
    if config.get("init_from") is not None and config.get("init_from") == config.get("model"):
        adapter = config.get("adapter")
        by = f" through an adapter ({adapter})" if adapter not in (None, "none") else ""
        return f"Fine-tuned with its zeros kept{by}: {amount}"
    title = METHODS[method].title if method in METHODS else method
    start = f", from {_start(config, shown)}{_in_basis(step)}"
    if method in METHODS and METHODS[method].step0 == "dense":
        start = ""
    teacher = shown(config["teacher"]) if config.get("teacher") else "the dense model"
    distilled = f", distilled from {teacher} (weight {config['eta']:.2g})" if config.get("eta") else ""
    rounded, bits = step.rounded, ""
    if rounded is not None:
        size = "" if rounded.bits_per_weight is None else f" ({rounded.bits_per_weight:.2f} bits each)"
        bits = f", with {rounded.kind} weights{size}"
    return f"Trained by {title}{start}: {amount}{distilled}{bits}"


def _start(config: Mapping[str, Any], shown: Callable[[str], str]) -> str:
    start = str(config.get("init_from"))
    if start not in SOLVER_TITLES:
        return f"the masks of {shown(start)}"
    refined = _refined(config) if start == "sparsegpt" else ""
    return f"a start by {SOLVER_TITLES[start]}{refined}"


def _in_basis(step: PastStep) -> str:
    """The change of basis before a prune or a start, in words."""
    changes = step.changes_of_basis
    return f" in a basis that keeps the function of the model ({', '.join(changes)})" if changes else ""


def _refined(options: Mapping[str, Any]) -> str:
    """The refinements of SparseGPT in `options`, in words."""
    names = [words for option, words in _REFINED.items() if options.get(option)]
    return f" with {' and '.join(names)}" if names else ""
