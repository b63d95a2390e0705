"""Copy on disk of the documents of a run, which all its clients on one machine read in place of the data sources."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable
from filelock import FileLock

from configs.output import replacing


def copied_documents(path: Path, load: Callable[[], Dataset]) -> Dataset:
    """Documents from the Arrow file ``path``, memory-mapped; where it is absent or damaged it is written first.

    One process reads the data sources while others wait. Without room on the disk, or without locks there, each returns
    the documents as it loaded them.

    Args:
        path: of the file; its folder is made.
        load: reads the documents from the data sources.
    """
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        return _read(path) or _written(path, load())


def _read(path: Path) -> Dataset | None:
    """The documents of a whole file; None of any other."""
    with suppress(OSError, pyarrow.ArrowException), pyarrow.memory_map(str(path)) as file:
        # No cache files of the datasets library beside it, unlike of a dataset that the library saved.
        return Dataset(InMemoryTable(pyarrow.ipc.open_stream(file).read_all()))
    return None


def _written(path: Path, documents: Dataset) -> Dataset:
    table = documents.data.table
    with suppress(OSError), replacing(path) as target, pyarrow.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table)
    return documents
