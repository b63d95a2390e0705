"""Safetensors container of a JSON header and named byte columns, under a checksum over all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import safetensors
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import save

from federated.updates.update import RefusedUpdate

_HEADER = "header"


class ColumnsHeader(BaseModel):
    """Base of the header of a container.

    A subclass declares its last field ``checksum: str = ""``, which covers its other fields and every column: the order
    of the fields is part of the stored format.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    if TYPE_CHECKING:
        checksum: str

    def unsigned(self) -> bytes:
        """The header as JSON with an empty checksum, as the checksum covers it."""
        return self.model_copy(update={"checksum": ""}).model_dump_json().encode()


H = TypeVar("H", bound=ColumnsHeader)
Checksum = Callable[[H, Mapping[str, bytes]], str]


def write_columns(header: H, columns: Mapping[str, bytes], checksum: Checksum[H]) -> bytes:
    """Serialize a header, its checksum filled in here, and columns; equal contents give equal bytes."""
    signed = header.model_copy(update={"checksum": checksum(header, columns)})
    parts = {_HEADER: signed.model_dump_json().encode(), **columns}
    return save({name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()})


def read_columns(
    data: bytes,
    header_type: type[H],
    checksum: Checksum[H],
    *,
    kind: str,
    contents: str,
    names: Collection[str] | None = None,
) -> tuple[H, dict[str, bytes]]:
    """Parse and verify the bytes of ``write_columns``.

    Args:
        data: bytes of the container.
        header_type: schema of the header.
        checksum: function that ``write_columns`` was given.
        kind: noun of the container in messages, e.g. ``a snapshot``.
        contents: noun of the columns in messages.
        names: columns that must be there, and no other; None for any.

    Raises:
        RefusedUpdate: anything that no ``write_columns`` wrote.
    """
    try:
        tensors = dict(safetensors.deserialize(data))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise RefusedUpdate(f"not {kind}: {error}") from error
    known = _HEADER in tensors if names is None else set(tensors) == {_HEADER, *names}
    if not known or any(view["dtype"] != "U8" for view in tensors.values()):
        raise RefusedUpdate(f"not {kind}: expected a header and {contents}")
    columns = {name: bytes(view["data"]) for name, view in tensors.items()}
    try:
        header = header_type.model_validate_json(columns.pop(_HEADER))
    except ValidationError as error:
        first = error.errors()[0]
        raise RefusedUpdate(f"header: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    if header.checksum != checksum(header, columns):
        raise RefusedUpdate("checksum mismatch")
    return header, columns
