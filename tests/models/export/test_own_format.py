from __future__ import annotations

import pytest

from configs.choices import ExportFormat
from configs.errors import UserError
from models.export.own_format import check_own_format, copy_checkpoint
from models.files.config_file import read_config
from tests.conftest import tiny_llama
from tests.support.command import tree
from tests.support.tiny_moes import saved_moe

OWN = {
    "mixtral": ExportFormat.MIXTRAL,
    "qwen2_moe": ExportFormat.QWEN2_MOE,
    "granitemoe": ExportFormat.GRANITE_MOE,
    "granitemoeshared": ExportFormat.GRANITE_MOE,
}


@pytest.mark.parametrize("family", OWN)
def test_only_the_own_format_is_accepted(tmp_path, tiny_tokenizer, family):
    config = read_config(str(saved_moe(family, tmp_path, tiny_tokenizer)))
    for to in ExportFormat:
        if to == OWN[family]:
            check_own_format(config, to, "x")
        else:
            with pytest.raises(UserError, match=f"got a model of type '{family}' in x; only graphs change"):
                check_own_format(config, to, "x")


def test_a_dense_model_is_refused():
    with pytest.raises(UserError, match="'mixtral', got a model of type 'llama'"):
        check_own_format(tiny_llama().config, ExportFormat.MIXTRAL, "x")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_copy_has_the_bytes_of_the_checkpoint(tmp_path, tiny_tokenizer, sharded):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    if sharded:
        from tests.support.tiny_moes import tiny_moe

        (source / "model.safetensors").unlink()
        tiny_moe("mixtral").save_pretrained(source, max_shard_size="20KB")
        assert len(list(source.glob("*.safetensors"))) > 1
    (tmp_path / "copy").mkdir()
    copy_checkpoint(source, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)


def test_a_damaged_checkpoint_is_refused(tmp_path, tiny_tokenizer):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "copy").mkdir()
    with pytest.raises(UserError):
        copy_checkpoint(source, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
