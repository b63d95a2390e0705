"""Data sources that need no network."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError

_BUILT_IN = "wikimix"


def local_data(data: str) -> str:
    """A data source that needs no network: ``wikimix``, ``wikimix:DOMAIN``, or the path of a file or folder.

    Raises:
        UserError: anything else.
    """
    source = (data or "").strip()
    if source.partition(":")[0] == _BUILT_IN or (source and Path(source).expanduser().exists()):
        return source
    raise UserError(
        f"expected `data` to be wikimix or a file or folder of this machine, got {source or 'nothing'}"
    )
