"""JSON files with a version field; another version than expected is read with a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from configs.errors import UserError


def read_versioned_json(path: Path, *, what: str, version: str) -> dict[str, Any]:
    """Read a file of one JSON object.

    Args:
        path: path of the file.
        what: kind of the file with its article, for messages.
        version: expected value of ``version``; any other gives a warning.

    Raises:
        UserError: no such file, or not one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"expected {what}, got {path}, which is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"expected {what} in JSON, got {path}, which cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"expected {what}, one JSON object, got a {type(value).__name__} in {path}")
    if value.get("version") != version:
        found = f"version {value['version']!r}" if "version" in value else "no version"
        warnings.warn(f"{path} has {found}; it is read as version {version!r}", stacklevel=2)
    return value
