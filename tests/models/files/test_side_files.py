from __future__ import annotations

import pytest

from configs.errors import UserError
from models.files import side_files
from models.files.side_files import copy_side_files, local_checkpoint
from tests.support.command import tree


def test_everything_but_weights_configuration_and_hidden_files_is_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    kept = (
        "tokenizer.json",
        "modeling_x.py",
        "LICENSE",
        "code/layer.py",
        "code/__init__.py",
        "templates/t.jinja",
    )
    left = (
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        ".gitattributes",
    )
    left += (
        "pytorch_model.bin.index.json",
        "x.gguf",
        "original/consolidated.pth",
        ".cache/x",
        "pruned/config.json",
    )
    left += ("pruned/tokenizer.json", "recipe.safetensors")
    for name in (*kept, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    copy_side_files(source, out)
    assert {name: data for name, data in tree(out).items() if data} == {name: name.encode() for name in kept}


def test_links_into_a_cache_become_files(tmp_path):
    (tmp_path / "blob").write_text("words")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "vocab.txt").symlink_to(tmp_path / "blob")
    copy_side_files(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert local_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["no/such-model", "not a name", "a/b/c"])
def test_neither_a_folder_nor_a_model_is_refused(source):
    with pytest.raises(UserError, match=f"expected a checkpoint folder or a hub id, got {source}"):
        local_checkpoint(source)


def test_a_model_is_fetched_only_where_the_cache_lacks_its_weights(tmp_path, monkeypatch, tiny_llama_dir):
    asked = []

    def snapshot(source, *, local_files_only, ignore_patterns):
        asked.append(local_files_only)
        assert source == "some/model" and "*.bin" in ignore_patterns
        return str(tmp_path if local_files_only else tiny_llama_dir)

    monkeypatch.setattr(side_files, "snapshot_download", snapshot)
    assert local_checkpoint("some/model") == tiny_llama_dir and asked == [True, False]
    monkeypatch.setattr(side_files, "snapshot_download", lambda source, **options: str(tiny_llama_dir))
    assert local_checkpoint("some/model") == tiny_llama_dir
