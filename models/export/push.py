"""Upload of an export to a model hub."""

from __future__ import annotations

from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from configs.errors import UserError, first_line
from models.export.card import CARD_NAME

# Hidden files and unfinished ones stay.
_LEFT_OUT = [".*", "**/.*", "*.partial", "*.lock"]


def check_pushable(folder: Path) -> None:
    """Check that a folder holds a model and its card.

    Raises:
        UserError: names what is missing.
    """
    if not folder.is_dir():
        raise UserError(f"expected the folder of an export, got {folder}; make one with `fedgraft export`")
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if not weights:
        raise UserError(f"expected safetensors weights or a GGUF file in {folder}, got none; export a model")
    if not (folder / CARD_NAME).is_file():
        raise UserError(
            f"expected a model card {CARD_NAME} in {folder}, got none; write one that names base and licence"
        )


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    revision: str | None = None,
    endpoint: str | None = None,
) -> dict[str, str]:
    """Upload a folder as one commit to a model repository, which is created where it is absent.

    Args:
        folder: that ``check_pushable`` accepts.
        repository: ``owner/name``.
        private: whether a new repository is private.
        revision: branch; None: main.
        endpoint: URL of the hub; None: that of ``HF_ENDPOINT``, else huggingface.co.

    Returns:
        ``{"repository", "url", "commit"}``.

    Raises:
        UserError: the hub refuses, e.g. without a token, or cannot be reached.
    """
    api = HfApi(endpoint=endpoint)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.name}",
            ignore_patterns=_LEFT_OUT,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise UserError(
            f"expected a hub that accepts {repository}, got: {first_line(error)}; log in with `hf auth login`, "
            "and check the name of the repository and HF_ENDPOINT"
        ) from error
    return {"repository": repository, "url": str(url), "commit": commit.oid}
