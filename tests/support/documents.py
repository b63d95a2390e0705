"""Data files of documents with a training and a held-out part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from federated.data.splits import held_out_count


def write_documents(path: Path, texts: Sequence[str]) -> None:
    """Write JSON lines of documents; the field ``split`` marks the last 10 % as held out."""
    train = len(texts) - held_out_count(len(texts))
    rows = [{"text": text, "split": "train" if i < train else "valid"} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
