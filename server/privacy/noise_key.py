"""File of the secret key of a run's noise, beside the state from which the run continues."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from configs.durable import sync_folder
from configs.errors import UserError
from server.privacy.noise import KEY_BYTES

NOISE_KEY = "noise.key"


def create_noise_key(folder: Path) -> bytes:
    """Write a new random key to ``noise.key`` in ``folder``, readable by its owner only, and return it."""
    key = secrets.token_bytes(KEY_BYTES)
    path, partial = folder / NOISE_KEY, folder / f".{NOISE_KEY}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(folder)
    return key


def read_noise_key(folder: Path) -> bytes:
    """Read the key of a run that is continued.

    Raises:
        UserError: there is none, as after the end of a run, or it is damaged.
    """
    path = folder / NOISE_KEY
    key = path.read_bytes() if path.is_file() else b""
    if len(key) != KEY_BYTES:
        raise UserError(
            f"expected the key of the noise of {KEY_BYTES} bytes in {path}, got {len(key)}; the run cannot be continued"
        )
    return key


def remove_noise_key(folder: Path) -> None:
    """Remove the key after the last round: whoever has it can subtract the noise from every released model."""
    (folder / NOISE_KEY).unlink(missing_ok=True)
    sync_folder(folder)
