"""Uploads a verified model folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from castlm.core.errors import InputError


def check_login(repo_id: str) -> None:
    """Makes sure before a run that its result can be uploaded.

    Raises:
        InputError: `repo_id` is not a valid name, the user is not logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"hub_model_id {repo_id}: {_first_line(error)}") from None
    except Exception as error:  # of the HTTP client, which depends on huggingface_hub's version
        raise InputError(f"push_to_hub: {_first_line(error)}; log in with hf auth login, or leave it out") from None


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Creates the repository `repo_id` if needed and uploads all files of a model folder in one commit.

    The commit removes weights of an earlier upload under other names, which would be loaded instead of these.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the upload fails; the folder is unchanged, and the message says how to upload it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        commit: Any = api.upload_folder(
            folder_path=folder,
            repo_id=created.repo_id,
            commit_message="Sparse model, verified by castlm",
            ignore_patterns=["castlm-output.json"],  # records of this disk
            delete_patterns=["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
        )
    except Exception as error:  # of the HTTP client, which depends on huggingface_hub's version
        raise InputError(
            f"push_to_hub: {_first_line(error)}; the result is whole: hf upload {repo_id} {folder} sends it"
        ) from error
    return str(getattr(commit, "commit_url", commit))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
