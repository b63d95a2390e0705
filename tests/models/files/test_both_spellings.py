from __future__ import annotations

import json

from transformers import AutoConfig, LlamaConfig

from models.files.both_spellings import with_both_spellings, write_both_spellings

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_rotary_settings_and_dtype_have_the_keys_of_both():
    config = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "dtype": "bfloat16", "a": 1}
    added = {"rope_theta": 5e4, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert with_both_spellings(config) == config | added
    scaled = {"rope_parameters": {"rope_theta": 5e4, **LLAMA3}}
    assert with_both_spellings(scaled) == scaled | {"rope_theta": 5e4, "rope_scaling": LLAMA3}
    partial = {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}}
    expected = partial | {"rope_theta": 5e4, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert with_both_spellings(partial) == expected


def test_old_keys_that_say_something_else_are_replaced():
    config = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "dtype": "float32"}
    stale = {"rope_theta": 1.0, "rope_scaling": LLAMA3, "torch_dtype": "float16"}
    assert with_both_spellings(config | stale) == with_both_spellings(config)


def test_a_configuration_without_the_new_keys_stays():
    old = {"rope_theta": 5e4, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert with_both_spellings(old) == old
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "dtype": None}
    assert with_both_spellings(nested) == nested


def test_the_file_is_read_as_before(tmp_path):
    config = LlamaConfig(rope_parameters={"rope_theta": 5e4, **LLAMA3}, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    write_both_spellings(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"], values["torch_dtype"]) == (5e4, LLAMA3, "bfloat16")
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters and read.dtype == config.dtype
    assert "rope_theta" not in read.to_dict() and "torch_dtype" not in read.to_dict()
