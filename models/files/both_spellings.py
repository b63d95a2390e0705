"""Configuration files that transformers 4.57 and 5 read alike: rotary settings and dtype under the keys of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.output import write_json


def with_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the values of a ``config.json`` of transformers 5 the keys that transformers 4.57 reads.

    ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` are those of ``rope_parameters``; ``torch_dtype`` is
    ``dtype``. A configuration without the new keys, or with rotary settings per layer type, stays as it is.
    """
    values = dict(config)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        if "partial_rotary_factor" in scaled:
            values["partial_rotary_factor"] = scaled.pop("partial_rotary_factor")
        values["rope_scaling"] = None if scaled.get("rope_type", "default") == "default" else scaled
    if values.get("dtype") is not None:
        values["torch_dtype"] = values["dtype"]
    return values


def write_both_spellings(directory: Path) -> None:
    """Apply ``with_both_spellings`` to the ``config.json`` of a checkpoint folder."""
    path = directory / "config.json"
    write_json(path, with_both_spellings(json.loads(path.read_text(encoding="utf-8"))))
