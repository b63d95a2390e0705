"""Documents of a run: one dataset of text, domain and split from all data sources."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import datasets

from configs.choices import LossOn, check_choice
from configs.errors import UserError, nearest
from configs.prompt_templates import CONTEXT_COLUMNS, INSTRUCTION_COLUMNS, RESPONSE_COLUMNS, load_template
from configs.values import split_list
from federated.data.answers import RANGES
from federated.data.chat_template import ChatTemplate
from federated.data.chats import CHAT_COLUMNS
from federated.data.document_files import read_source
from federated.data.field_text import is_nan, storable_text
from federated.data.record_files import Record, record_stem
from federated.data.record_text import RecordForm
from federated.data.splits import HELD_OUT, assign_splits, hold_out, split_word

_GENERIC_NAMES = ("train", "data", "all")
_CONSUMED = {"text", "split", *INSTRUCTION_COLUMNS, *CONTEXT_COLUMNS, *RESPONSE_COLUMNS}
_OWN_SPLIT = "split word"
# Training documents generated per domain of WikiMix.
WIKIMIX_DOCUMENTS = 2000

Row = dict[str, Any]


def load_documents(
    sources: Sequence[str],
    *,
    template: str = "auto",
    chat: ChatTemplate | None = None,
    loss_on: str = LossOn.ALL,
    wikimix_documents: int = WIKIMIX_DOCUMENTS,
    seed: int = 0,
) -> datasets.Dataset:
    """Load all ``sources`` into one dataset, one document per row, in the order of the sources.

    A source is ``wikimix``, ``wikimix:DOMAIN,...``, a file (see ``record_files``), a folder of files, also in
    sub-folders, or the id of a hub dataset (``owner/name[:config]``). ``template`` renders instruction records as text,
    ``chat`` chats (see ``chats``), in the plain form of ``ChatTemplate`` unless given. With ``loss_on`` ``answers``
    every record has an answer, and the column ``RANGES`` holds where (see ``AnsweredText``). ``wikimix_documents`` is
    the number of training documents generated per wikimix domain, with ``seed``.

    Columns: ``text``; ``domain`` (that of the records where all records of a source have one, else derived from the
    source's name); ``split``, ``train`` or ``valid``; and the records' scalar fields, nested ones with dotted names.
    Splits come from the names of files, folders or splits, else from the records' column ``split`` (see ``splits``).
    For a source without both splits, the last 10 % of each domain are ``valid``, which a warning says.

    Raises :class:`UserError` for a source that does not exist, cannot be read or has no document.
    """
    check_choice("loss-on", loss_on, LossOn)
    form = RecordForm(load_template(template), template != "auto", chat or ChatTemplate(), loss_on)
    rows: list[Row] = []
    for source, label in zip(sources, source_labels(sources), strict=True):
        if is_wikimix(source):
            if loss_on == LossOn.ANSWERS:
                raise UserError(
                    "expected records with answers where the loss is on answers only, got the plain text of wikimix; "
                    "set loss-on to all, or leave the source out"
                )
            rows += _wikimix_rows(source, wikimix_documents, seed)
        else:
            rows += _source_rows(source, label, form)
    if not rows:
        raise UserError("expected at least one data source, got none; set `data`, e.g. to wikimix")
    return _to_dataset(rows)


def source_labels(sources: Sequence[str]) -> list[str]:
    """Distinct short label of each source: its name, with that of its folder or a number where needed."""
    labels: list[str] = []
    for source in sources:
        path = Path(source).expanduser().resolve()
        name = record_stem(path) if path.is_file() else path.name
        short = path.parent.name if path.is_file() and name in _GENERIC_NAMES else name
        longer = f"{path.parent.name}-{name}"
        numbered = (f"{longer}-{number}" for number in count(2))
        labels.append(next(label for label in chain((short, longer), numbered) if label not in labels))
    return labels


def absolute_sources(sources: Sequence[str]) -> list[str]:
    """The sources with existing paths made absolute, for a process in another working directory."""
    paths = [Path(source).expanduser() for source in sources]
    return [
        str(path.resolve()) if path.exists() and not is_wikimix(source) else source
        for source, path in zip(sources, paths, strict=True)
    ]


def is_wikimix(source: str) -> bool:
    """Whether a source names the wikimix generator (a folder of that name is ``./wikimix``)."""
    return source.partition(":")[0] == "wikimix"


def _wikimix_rows(source: str, train_documents: int, seed: int) -> list[Row]:
    # Imported here, since runs on other data do not need the generator.
    from federated.data.wikimix import DOMAINS, documents

    chosen = split_list(source.partition(":")[2], ",") or tuple(DOMAINS)
    for name in chosen:
        if name not in DOMAINS:
            raise UserError(
                f"expected wikimix domains among {', '.join(DOMAINS)}, got {name!r}{nearest(name, DOMAINS)}"
            )
    sizes = {"train": train_documents, "valid": max(1, int(train_documents * HELD_OUT))}
    return [
        {"text": text, "domain": name, "split": split}
        for name in chosen
        for split, size in sizes.items()
        for text in documents(name, size, seed=seed, split=split)
    ]


def _source_rows(source: str, label: str, form: RecordForm) -> list[Row]:
    rows = [_row(record, split, form) for split, records in read_source(source).items() for record in records]
    rows = _without_empty(source, rows)
    if not any(row["split"] != "valid" for row in rows):
        raise UserError(f"expected documents in {source!r}, got none that holds any text")
    own_domains = all(isinstance(row.get("domain"), str) and row["domain"] for row in rows)
    for row in rows:
        row["domain"] = row["domain"] if own_domains else label
    return _split(source, rows)


def _without_empty(source: str, rows: list[Row]) -> list[Row]:
    kept = [row for row in rows if row["text"].strip()]
    if kept and len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        warnings.warn(
            f"{dropped} of {len(rows)} records of {source!r} have no text or no answer: they are left out",
            stacklevel=2,
        )
    return kept


def _split(source: str, rows: list[Row]) -> list[Row]:
    """Rows with their split: that of the source, else of the records' own column, else the last 10 % held out."""
    words = [row.pop(_OWN_SPLIT) for row in rows]
    if all(row["split"] for row in rows):
        return rows
    splits = assign_splits(words)
    if splits[0] == "":
        hold_out(rows)
        held_out = sum(row["split"] == "valid" for row in rows)
        warnings.warn(
            f"no training and held-out split in {source!r}: the last 10 % of each domain "
            f"({held_out} of {len(rows)} documents) are held out",
            stacklevel=2,
        )
        return rows
    if unnamed := words.count(""):
        warnings.warn(
            f"no split word in the column 'split' of {unnamed} of {len(rows)} records: "
            f"they are left out of {source!r}",
            stacklevel=2,
        )
    return [row | {"split": split} for row, split in zip(rows, splits, strict=True) if split]


def _row(located: Record, split: str, form: RecordForm) -> Row:
    where, record = located
    consumed = _CONSUMED if "text" in record else _CONSUMED | CHAT_COLUMNS
    fields = {name: value for name, value in _flat(record) if name not in consumed}
    found = form.text(where, record)
    row = {"text": found.text, "split": split, _OWN_SPLIT: split_word(record.get("split")), **fields}
    return row | {RANGES: list(found.ranges)} if form.loss_on == LossOn.ANSWERS else row


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Scalar fields of a record, NaN as None; nested names are joined with dots, lists are left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float | str):
            yield prefix + name, None if is_nan(value) else value


def _to_dataset(rows: list[Row]) -> datasets.Dataset:
    """Dataset with one type per column: columns of mixed types are converted to text."""
    names = dict.fromkeys(("text", "domain", "split"))
    for row in rows:
        names.update(dict.fromkeys(row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return datasets.Dataset.from_dict({name: _one_type(values) for name, values in columns.items()})


def _one_type(values: list[Any]) -> list[Any]:
    values = [_storable(value) for value in values]
    if len({type(value) for value in values if value is not None}) < 2:
        return values
    return [None if value is None else str(value) for value in values]


def _storable(value: Any) -> Any:
    """Convert a value to one that Arrow can store: no integers beyond 64 bits, no lone surrogates."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return storable_text(value) if isinstance(value, str) else value
