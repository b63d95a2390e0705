"""Readers of data sources: files and folders of records, datasets on disk and of the hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from configs.errors import UserError
from federated.data.record_files import SUFFIXES, Record, read_file, record_stem, record_suffix
from federated.data.splits import assign_splits, split_word

_NO_DATA_STEMS = {"readme", "license", "licence", "copying", "citation", "changelog", "requirements"}
_NO_DATA_NAMES = {"dataset_infos.json", "dataset_info.json", "_success"}
_NO_DATA_SUFFIXES = set(
    ".md .rst .py .ipynb .sh .html .pdf .png .jpg .svg .yaml .yml .toml .cff .bib .lock .log".split()
)
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


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
    if record_suffix(Path(source)) or not _HUB_ID.fullmatch(source):
        raise UserError(f"expected an existing file or folder or a hub dataset id, got {source!r}")
    return _dataset_records(source, _load_from_hub(source))


def _read_folder(folder: Path) -> dict[str, Iterable[Record]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _dataset_records(str(folder), datasets.load_from_disk(str(folder)))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _no_data(path, folder)]
    readable = [path for path in files if record_suffix(path)]
    if not readable:
        return _dataset_records(str(folder), _load_from_hub(str(folder)))
    if unknown := [path for path in files if not record_suffix(path)]:
        raise UserError(
            f"expected only {', '.join(SUFFIXES)} files in {str(folder)!r}, got {str(unknown[0])!r}; "
            "convert it or move it out of the folder"
        )
    named = (((record_stem(path), *reversed(path.relative_to(folder).parts[:-1])), path) for path in readable)
    return {split: _chain(paths) for split, paths in _by_split(str(folder), named).items()}


def _no_data(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is hidden, or a description, licence, script or picture beside the data."""
    name = path.name.lower()
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    described = name.partition(".")[0] in _NO_DATA_STEMS or name in _NO_DATA_NAMES
    return hidden or described or Path(name).suffix in _NO_DATA_SUFFIXES


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
        split: _numbered(source, parts)
        for split, parts in _by_split(source, (((name,), part) for name, part in named.items())).items()
    }


def _numbered(source: str, parts: Iterable[Iterable[Mapping[str, Any]]]) -> Iterator[Record]:
    for number, record in enumerate(chain.from_iterable(parts), start=1):
        yield f"{source}, record {number}", record
