from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from models.checkpoints.load import load_tokenizer
from models.files.tokenizer_files import save_tokenizer


@pytest.fixture
def source(tmp_path, tiny_llama_dir) -> Path:
    """A checkpoint whose tokenizer files are not as transformers would write them."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_in_4_57": True, **values}))
    (folder / "special_tokens_map.json").write_text('{"bos_token":   "<s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return folder


def test_files_of_a_loaded_tokenizer_are_copied_byte_for_byte(source, tmp_path):
    tokenizer = load_tokenizer(str(source))
    tokenizer.padding_side = "left"
    (tmp_path / "out").mkdir()
    save_tokenizer(tokenizer, tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"additional_chat_templates"}
    for name in [*names, "additional_chat_templates/tool.jinja"]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_new_tokenizer_is_saved_with_a_class_that_old_versions_have(tiny_tokenizer, tmp_path):
    save_tokenizer(tiny_tokenizer, tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "a dog, 3 cats"
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_a_tokenizer_whose_folder_is_gone_is_saved_anew(source, tmp_path):
    tokenizer = load_tokenizer(str(source))
    shutil.rmtree(source)
    (tmp_path / "out").mkdir()
    save_tokenizer(tokenizer, tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out"))("abc")["input_ids"] == tokenizer("abc")["input_ids"]
