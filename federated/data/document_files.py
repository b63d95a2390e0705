"""Readers of text records: ``.txt``, ``.jsonl`` and ``.json`` files, folders, hub and disk datasets."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from configs.errors import UserError
from federated.data.splits import assign_splits, split_word

SUFFIXES = (".txt", ".jsonl", ".json")
DOCUMENT_CHARACTERS = 2000
_SEPARATOR = re.compile(r"\f|<\|endoftext\|>")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")

Record = tuple[str, Mapping[str, Any]]
"""Location of a record (for messages) and its fields."""


def read_source(source: str) -> dict[str, Iterable[Record]]:
    """Records of a file, folder or hub dataset by split: ``train`` and ``valid``, or ``""`` without splits.

    Raises :class:`UserError` for a source that does not exist or cannot be read; malformed lines raise when they are
    read.
    """
    path = Path(source).expanduser()
    if not source.strip():
        raise UserError("expected the name of a data source, got an empty one")
    if path.is_file():
        return {"": read_file(path)}
    if path.is_dir():
        return _read_folder(path)
    if Path(source).suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise UserError(f"expected an existing file or folder or a hub dataset id, got {source!r}")
    return _dataset_records(source, _load_from_hub(source))


def read_file(path: Path) -> Iterator[Record]:
    """Records of one file; those of a ``.txt`` are ``{"text"}``."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"expected a {', '.join(SUFFIXES)} file, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {str(path)!r}, got {error.reason} at byte {error.start}; convert it"
        ) from None
    except OSError as error:
        raise UserError(f"expected a readable file, got {str(path)!r}: {error.strerror}") from None
    if path.suffix == ".txt":
        return ((str(path), {"text": document}) for document in split_text(text))
    return _json_list(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text)


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


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines(): JSON strings may contain line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _located(f"{path}, line {number}", _parse_json(line, path, first_line=number))


def _json_list(path: Path, text: str) -> Iterator[Record]:
    for number, record in enumerate(_parse_json(text, path, first_line=1), start=1):
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


def _read_folder(folder: Path) -> dict[str, Iterable[Record]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _dataset_records(str(folder), datasets.load_from_disk(str(folder)))
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not files:
        return _dataset_records(str(folder), _load_from_hub(str(folder)))
    splits = _by_split(str(folder), (((path.stem,), path) for path in files))
    return {split: _chain(paths) for split, paths in splits.items()}


def _chain(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        yield from read_file(path)


def _by_split(source: str, parts: Iterable[tuple[Sequence[str], Any]]) -> dict[str, list[Any]]:
    """Parts of a source by split; all of them under ``""`` where no training and held-out parts are named.

    Args:
        source: name of the source, for messages.
        parts: per part its names from the most to the least specific, and the part.
    """
    named = list(parts)
    words = [split_word(*names) for names, _ in named]
    grouped: dict[str, list[Any]] = {}
    for (names, part), word, split in zip(named, words, assign_splits(words), strict=True):
        if split is not None:
            grouped.setdefault(split, []).append(part)
        elif not word:
            warnings.warn(
                f"no split word in the name {names[0]!r}: it is left out of {source!r}", stacklevel=2
            )
    return dict(sorted(grouped.items()))  # train before valid


def _load_from_hub(source: str) -> Any:
    """``datasets.load_dataset`` for ``owner/name[:config]`` or a folder of e.g. parquet files."""
    name, config = source, None
    if not Path(source).is_dir() and (match := _HUB_ID.fullmatch(source)):
        name, config = match["name"], match["config"]
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the libraries underneath raise many types; all of them mean "cannot be read"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"expected a path that exists or a hub dataset that can be loaded, got {source!r}: {reason}"
        ) from None


def _dataset_records(source: str, dataset: Any) -> dict[str, Iterable[Record]]:
    named = dict(dataset) if isinstance(dataset, dict) else {"all": dataset}
    return {
        split: ((source, record) for part in parts for record in part)
        for split, parts in _by_split(source, (((name,), part) for name, part in named.items())).items()
    }
