"""Let transformers say which weights of a checkpoint it misses, on the meta device: nothing is read but names and
shapes.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from castlm.core.errors import InputError
from castlm.models.opening import quiet_transformers


def check_on_meta(folder: Path) -> set[str]:
    """Loads the model folder without its data, as the class that its config.json names.

    Returns:
        The names of the stored tensors that the class does not have.

    Raises:
        InputError: transformers does not know the class, or a weight is missing or has another shape.
    """
    try:
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            _, info = _class_of(folder, config).from_pretrained(
                folder,
                config=config,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
            )
    except InputError:
        raise
    except Exception as error:  # every config fails in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"transformers cannot say which layers {folder} should hold: {reason}") from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{name} of {folder} has the shape {tuple(stored)}, and its config.json asks for {tuple(expected)}: "
            "they do not belong together"
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder} lacks {missing[0]}{more} that its config.json asks for: fetch or write it again")
    return set(info["unexpected_keys"])


def _class_of(folder: Path, config: Any) -> type[PreTrainedModel]:
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
    kind = getattr(transformers, str(named[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise InputError(f"{folder}: transformers has no architecture {named[0]!r}: which layers it holds is unknown")
    return kind
