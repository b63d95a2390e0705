from __future__ import annotations

import tomllib

from configs.default_toml import defaults_toml
from configs.keys import keys_of
from configs.schema import RunConfig, run_config_defaults
from tests.support.paths import ROOT


def test_default_toml_is_generated_from_the_schema():
    assert (ROOT / "configs" / "default.toml").read_text() == defaults_toml()
    assert tomllib.loads(defaults_toml()) == run_config_defaults()


def test_keys_stand_in_the_order_of_the_schema_each_below_its_documentation():
    lines = [line for line in defaults_toml().splitlines()[2:] if line]
    comments, values = lines[::2], lines[1::2]
    assert all(comment.startswith("# ") and comment.endswith(".") for comment in comments)
    assert [value.partition(" = ")[0] for value in values] == keys_of(RunConfig)
