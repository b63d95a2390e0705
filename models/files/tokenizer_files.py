"""Files of a tokenizer: copied byte for byte from the checkpoint that it was loaded from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from configs.output import write_json

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"
# Class of a tokenizer without a class of its own, by its names in transformers 5 and in 4.57.
_CLASS_5, _CLASS_4 = "TokenizersBackend", "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Copy the files that a tokenizer was loaded from into a directory; a new tokenizer is saved by transformers.

    A tokenizer that transformers 5 saves names its class as transformers 4.57 does, too.
    """
    found = _stored_files(tokenizer)
    for file in found:
        shutil.copyfile(file, directory / file.name)
    templates = Path(tokenizer.name_or_path) / _TEMPLATES
    if found and templates.is_dir():
        shutil.copytree(templates, directory / _TEMPLATES, dirs_exist_ok=True)
    if not found:
        tokenizer.save_pretrained(directory)
        _name_class_of_both(directory / "tokenizer_config.json")


def _stored_files(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    source = tokenizer.name_or_path
    if not source:
        return []
    names = dict.fromkeys([*_NAMES, *tokenizer.vocab_files_names.values()])
    if Path(source).is_dir():
        return [Path(source, name) for name in names if Path(source, name).is_file()]
    try:
        options = {"_raise_exceptions_for_missing_entries": False}
        return [Path(file) for name in names if (file := cached_file(source, name, **options))]
    except (OSError, ValueError):  # the source is gone
        return []


def _name_class_of_both(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == _CLASS_5:
        write_json(path, values | {"tokenizer_class": _CLASS_4})
