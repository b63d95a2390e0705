"""Readers of files of records: plain text, JSON lines and documents, CSV, Parquet; all but Parquet also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError

DOCUMENT_CHARACTERS = 2000
SUFFIXES = (".txt", ".jsonl", ".json", ".ndjson", ".csv", ".parquet")
_GZIP = ".gz"
_SEPARATOR = re.compile(r"\f|<\|endoftext\|>")
_CELL_CHARACTERS = 2**31 - 1
_ROWS_AT_ONCE = 256
_NON_BLANK = re.compile(r"\S")

Record = tuple[str, Mapping[str, Any]]
"""Location of a record (for messages) and its fields."""


def record_suffix(path: Path) -> str:
    """Suffix of a file of records in lower case, without ``.gz``; ``""`` for other files."""
    name = path.name.lower()
    zipped = name.endswith(_GZIP)
    suffix = Path(name.removesuffix(_GZIP)).suffix
    return suffix if suffix in SUFFIXES and not (zipped and suffix == ".parquet") else ""


def record_stem(path: Path) -> str:
    """Name of a file without the suffixes of a file of records."""
    zipped = path.suffix.lower() == _GZIP
    return Path(path.stem).stem if zipped and record_suffix(path) else path.stem


def read_file(path: Path) -> Iterator[Record]:
    """Records of one file; those of a ``.txt`` are ``{"text"}``, those of a ``.csv`` have strings only.

    Raises:
        UserError: a file of another kind or one that cannot be read; malformed lines raise when they are read.
    """
    suffix = record_suffix(path)
    if not suffix:
        known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"expected a {known} file (or .gz of the text formats), got {str(path)!r}")
    if suffix == ".parquet":
        return _parquet(path)
    text = _read_text(path)
    if suffix == ".txt":
        return ((str(path), {"text": document}) for document in split_text(text) if document.strip())
    return _csv(path, text) if suffix == ".csv" else _json(path, text)


def split_text(text: str) -> list[str]:
    """Split a plain text into documents.

    Form feeds or ``<|endoftext|>`` separate documents. A text without separators is split into documents of about
    ``DOCUMENT_CHARACTERS`` characters, at blank lines where possible, so that some can be held out.
    """
    documents = _SEPARATOR.split(text)
    return documents if len(documents) > 1 else list(_cut(text, DOCUMENT_CHARACTERS))


def _cut(text: str, size: int) -> Iterator[str]:
    """Consecutive pieces of ``text`` of ``size / 2`` to ``3 size / 2`` characters."""
    start = 0
    while len(text) - start > 3 * size // 2:
        earliest = start + size // 2
        for mark in ("\n\n", "\n", " ", ""):
            at = text.rfind(mark, earliest, start + size)
            if at >= 0:
                break
        end = at + len(mark)
        yield text[start:end]
        start = end
    yield text[start:]


def _read_text(path: Path) -> str:
    """Text of a UTF-8 file, unzipped where its name ends in ``.gz``."""
    zipped = path.name.lower().endswith(_GZIP)
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            content = file.read()
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {str(path)!r}, got {error.reason} at byte {error.start}; convert it"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"expected a readable file, got {str(path)!r}: {reason}") from None


def _json(path: Path, text: str) -> Iterator[Record]:
    if text.lstrip()[:1] == "[":
        return _json_list(path, _parse_json(text, path, first_line=1))
    listed = _listed(path, text)
    return _json_lines(path, text) if listed is None else _json_list(path, listed)


def _listed(path: Path, text: str) -> list[Any] | None:
    """Records of one JSON object: the list under ``data``, else the object itself; None for JSON lines."""
    body = text.lstrip()
    first = body[: body.find("\n") + 1 or None]
    more = _NON_BLANK.search(body, len(first)) is not None
    if not first.startswith("{") or more and _is_json(first):
        return None
    whole = _parse_json(text, path, first_line=1)
    data = whole.get("data")
    if isinstance(data, list) and "text" not in whole:
        return data
    return [whole] if more else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines(): JSON strings may contain line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _located(f"{path}, line {number}", _parse_json(line, path, first_line=number))


def _json_list(path: Path, records: list[Any]) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield _located(f"{path}, record {number}", record)


def _parse_json(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"expected JSON in {str(path)!r}, got an error at line {line}: {error.msg}") from None


def _located(where: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object in {where}, got {type(record).__name__}")
    return where, record


def _csv(path: Path, text: str) -> Iterator[Record]:
    """Records of a CSV file with a header line. Cells stay as written: types inferred from values lose zeros."""
    csv.field_size_limit(_CELL_CHARACTERS)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"expected CSV in {str(path)!r}, got an error at line {rows.line_num}: {error}"
            ) from None
        if row is None:
            return
        if not header:
            header = row
        elif row:
            if len(row) != len(header):
                raise UserError(
                    f"expected {len(header)} cells in {path}, line {rows.line_num}, got {len(row)}; "
                    "quote cells that hold commas"
                )
            cells = zip(header, row, strict=True)
            yield f"{path}, line {rows.line_num}", {name: cell for name, cell in cells if name}


def _parquet(path: Path) -> Iterator[Record]:
    # Imported here: other formats do not need it.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected a Parquet file, got {str(path)!r}: {reason}") from None
