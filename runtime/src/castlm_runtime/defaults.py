"""What a model says of its own generation: generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from castlm_runtime.errors import InputError
from castlm_runtime.reading import read_json_object


@dataclass(frozen=True)
class Defaults:
    """What generation_config.json of a model says of sampling and of the end of a text.

    Attributes:
        ends: the tokens that end a text.
        stop: texts that end an answer.
    """

    ends: frozenset[int] = frozenset()
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | Path) -> Defaults:
        """Reads generation_config.json of a folder, or config.json where there is none."""
        folder = Path(folder)
        name = "generation_config.json"
        found = read_json_object(folder / (name if (folder / name).is_file() else "config.json"))
        return cls.of(found)

    @classmethod
    def of(cls, config: dict[str, object]) -> Defaults:
        """Reads the content of generation_config.json. Raises `InputError` where a value makes no sense."""
        ends, stop = config.get("eos_token_id"), config.get("stop_strings") or ()
        try:
            return cls(
                frozenset([ends] if isinstance(ends, int) else ends or ()),  # type: ignore[call-overload]
                int(config.get("top_k") or 0),  # type: ignore[call-overload]
                float(config.get("top_p") or 1.0),  # type: ignore[arg-type]
                float(config.get("repetition_penalty") or 1.0),  # type: ignore[arg-type]
                (stop,) if isinstance(stop, str) else tuple(stop),  # type: ignore[arg-type]
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"generation_config.json is damaged ({error}): {json.dumps(config)[:200]}") from error
