"""Models and texts in memory, as the functions of `castlm.api` take them, and the result that they return.

castlm works on files: a run is resumed from them, and ranks read their rows there. So an object is written to files
first, beside the output or in a temporary folder, and takes the same way as a name. Without an output folder the
result is read back into memory, and the files are deleted.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from castlm.core.errors import InputError, check_type
from castlm.facts import Facts, Perplexities, Verdict, to_json
from castlm.signals import num_ranks

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from castlm.models.io import Loaded


GIVEN = ".given"
"""The suffix of the folder beside an output folder that holds the objects until the result is there."""


@dataclass(frozen=True)
class Result:
    """The result of `castlm.prune`, `train`, `finetune`, `quantize`, `pack` or `unpack`.

    Attributes:
        folder: the folder of the verified model; None if the result is in memory alone.
        facts: the entries of its castlm.json.
        report: what the command found on the way: the errors of layers, or bytes before and after.
    """

    folder: Path | None
    facts: Facts
    report: Any = None
    unpack: bool = True
    """Whether `model` is made of dense layers; otherwise castlm's kernels run a packed one."""
    held: Loaded | None = field(default=None, repr=False)
    """The model in memory, if there is no folder."""

    @cached_property
    def _loaded(self) -> Loaded:
        if self.held is not None:
            return self.held
        from castlm.models.io import load_model

        assert self.folder is not None
        return load_model(self.folder, dtype=None, unpack=self.unpack)

    @property
    def model(self) -> PreTrainedModel:
        """The model, in the dtype of its files; loaded from `folder` when it is first asked for."""
        return self._loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self._loaded.tokenizer

    @property
    def perplexity(self) -> Perplexities:
        """The perplexities of a run, on its evaluation text."""
        return self.facts.perplexity

    @property
    def verdict(self) -> Verdict | None:
        """Whether a run improved the model; None if nothing was trained."""
        return self.facts.verdict


if TYPE_CHECKING:
    Model: TypeAlias = str | Path | PreTrainedModel | Loaded | Result
    Text: TypeAlias = str | Path | Mapping[str, float] | Iterable[Any]


class Objects:
    """The files of the objects that one call was given; as a context, it deletes them when the call has its result.

    Args:
        output_dir: as the call was given it; without one, the result has a temporary folder too.
    """

    def __init__(self, output_dir: str | Path | None) -> None:
        self._given_output = output_dir
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._beside: Path | None = None

    def __enter__(self) -> Self:
        if self._given_output is None:
            _refuse_ranks("without output_dir, the result is in memory", "give output_dir")
            self._temporary = tempfile.TemporaryDirectory(prefix="castlm-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
        # A run that was stopped is resumed by the same call, which writes the same files again.
        if self._beside is not None:
            shutil.rmtree(self._beside, ignore_errors=True)

    @property
    def output_dir(self) -> str:
        """The output folder of the command."""
        if self._temporary is not None:
            return str(Path(self._temporary.name) / "result")
        return str(self._given_output)

    def _folder(self) -> Path:
        if self._temporary is not None:
            folder = Path(self._temporary.name) / "given"
        else:
            from castlm_runtime.reading import user_path

            output = user_path(self.output_dir).absolute()
            folder = self._beside = output.with_name(output.name + GIVEN)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def model(self, model: Model, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "model") -> str:
        """The name of a model; of a model in memory, the folder to which it is written with its tokenizer.

        Raises:
            InputError: something else than a name or a model of transformers, a model without a tokenizer, or several
                ranks, which would each write their own.
        """
        if isinstance(model, Result) and model.folder is not None:
            model = model.folder
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise InputError(f"tokenizer goes with a model in memory, and {name} is the name {model}: leave it out")
            return str(model)
        from transformers import PreTrainedModel

        from castlm.models.io import Loaded, save_model

        known = model.facts if isinstance(model, Result) else None
        if isinstance(model, (Result, Loaded)):
            tokenizer = tokenizer or model.tokenizer
            model = model.model
        remedy = "for other modules there are castlm.AdamS, prune_ and their filter_fn"
        check_type(model, PreTrainedModel, f"{name} must be a name, a path or a PreTrainedModel", remedy)
        _refuse_ranks(f"{name} is in memory", "save it, and give the folder")
        folder = self._folder() / name
        tokenizer = tokenizer or known_tokenizer(model, name)
        save_model(model, tokenizer, folder)
        _write_record(model, folder, known)
        return str(folder)

    def text(self, text: Text | None, name: str = "text") -> str | tuple[str, ...] | None:
        """The name of a text, or the names of several with their weights; of documents in memory, their file.

        Args:
            text: a name or path; `{name: weight}` of several; a `datasets.Dataset` or any other iterable of documents,
                each a string, or a row with text or messages.

        Raises:
            InputError: no documents, a document that is neither text nor a row, or several ranks.
        """
        if text is None or isinstance(text, (str, Path)):
            return None if text is None else str(text)
        if isinstance(text, Mapping):
            return tuple(f"{each}:{weight:g}" for each, weight in text.items())
        remedy = "give a list of texts, a datasets.Dataset, or {name: weight} for several texts"
        check_type(text, Iterable, f"{name} must be a name, a path or documents", remedy)
        _refuse_ranks(f"{name} is in memory", "save it as .jsonl or .parquet, and give the file")
        folder = self._folder()
        if hasattr(text, "to_parquet"):  # images too
            file = folder / f"{name}.parquet"
            text.to_parquet(file)
            return str(file)
        file = folder / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            for number, document in enumerate(text, 1):
                stream.write(_line(document, number, name))
        return str(file)

    def result(self, folder: str | Path, facts: Facts | None = None, report: Any = None, unpack: bool = True) -> Result:
        """The result in `folder`; in memory if the call was given no output folder."""
        folder = Path(folder)
        facts = facts or Facts.read(folder)
        if self._temporary is None:
            return Result(folder, facts, report, unpack)
        from castlm.models.io import load_model

        return Result(None, facts, report, unpack, load_model(folder, dtype=None, unpack=unpack))


def _refuse_ranks(what: str, remedy: str) -> None:
    if num_ranks() > 1:
        raise InputError(f"{what}, and there are {num_ranks()} ranks, which share files alone: {remedy}")


def _line(document: Any, number: int, name: str) -> str:
    """A document as a line of .jsonl."""
    row = {"text": document} if isinstance(document, str) else document
    try:
        if not isinstance(row, Mapping):
            raise TypeError(f"a {type(document).__name__}")
        return json.dumps(dict(row), ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"document {number} of {name} is no text and no row of one ({error}): give strings, rows such as "
            '{"text": ...} or {"messages": ...}, or a datasets.Dataset'
        ) from None


def known_tokenizer(model: PreTrainedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder or repository that a model was loaded from."""
    from castlm.models.io import open_model

    source = model.config.name_or_path
    try:
        if not source:
            raise InputError("it was not loaded from files")
        return open_model(source)[2]
    except InputError as error:
        raise InputError(f"{name} is in memory, and its tokenizer is not known ({error}): give tokenizer=") from None


def in_memory_or_named(
    model: Model, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | str:
    """A model in memory with its tokenizer, or the name of one that is to be loaded.

    Raises:
        InputError: something else, or a model in memory whose tokenizer is not known.
    """
    from transformers import PreTrainedModel

    from castlm.models.io import Loaded

    if isinstance(model, (Result, Loaded)):
        tokenizer = tokenizer or model.tokenizer
        model = model.model
    if isinstance(model, PreTrainedModel):
        return model, tokenizer or known_tokenizer(model, "model")
    check_type(model, (str, Path), "model must be a name, a path or a PreTrainedModel", "give one")
    return str(model)


def _write_record(model: PreTrainedModel, folder: Path, facts: Facts | None) -> None:
    """Writes beside a model what is known of it and its results take over: base model, licence, steps and pattern.

    Args:
        facts: of a result of castlm; otherwise, those of the folder or repository that the model was loaded from.
    """
    from castlm.export.origin import made_by, origin_in_memory
    from castlm.facts import Origin
    from castlm.files.atomic_file import atomic_write_json
    from castlm.files.record import RESULT

    if facts is None:
        source = Path(model.config.name_or_path or "")
        facts = Facts.read(source) if (source / RESULT).is_file() else Facts(pattern=None, left_dense={})
        origin = origin_in_memory(model)
    else:
        origin = Origin(facts.base_model, facts.license, made_by(facts) or None)
    if origin.base_model is not None or facts.pattern is not None:
        own = Facts(pattern=facts.pattern, left_dense=facts.left_dense, cut=facts.cut, **vars(origin))
        atomic_write_json(folder / RESULT, to_json(own))
