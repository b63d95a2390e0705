"""Settings of a run that is continued."""

from __future__ import annotations

import tomllib

import pytest

from configs.errors import UserError
from configs.schema import RunConfig, load_run_config
from server.state.settings import MAY_CHANGE, RESUME_FILE, SETTINGS_FILE, Settings, read_settings

CONFIG = RunConfig(num_rounds=5, density=0.5)


def test_settings_are_read_as_they_were_written(tmp_path):
    settings = Settings(2**64 - 1, "f" * 64, CONFIG.values())
    settings.write(tmp_path)
    assert read_settings(tmp_path) == settings


def test_the_configuration_that_continues_the_run_is_written_for_flwr_run(tmp_path):
    Settings(1, "f", CONFIG.values()).write(tmp_path / "state")
    values = tomllib.loads((tmp_path / "state" / RESUME_FILE).read_text())
    expected = CONFIG.model_copy(update={"resume": True, "log_dir": str(tmp_path)})
    assert load_run_config(values) == expected


def test_keys_that_change_no_result_may_differ():
    settings = Settings(1, "f", CONFIG.values())
    settings.check(CONFIG.model_copy(update={"out": "/x", "resume": True, "reply_timeout": 3.0}), "f")
    settings.check(CONFIG.model_copy(update={"graph": "/moved", "base": "/moved/too"}), "f")
    assert set(MAY_CHANGE) <= set(CONFIG.values())


def test_every_other_difference_is_named():
    changed = CONFIG.model_copy(update={"density": 0.25, "num_rounds": 9})
    with pytest.raises(UserError, match=r"num-rounds = 9 in place of 5.*density = 0.25 in place of 0.5"):
        Settings(1, "f", CONFIG.values()).check(changed, "f")
    with pytest.raises(UserError, match="expected the graph aaaaaaaaaaaa .*got bbbbbbbbbbbb"):
        Settings(1, "a" * 64, CONFIG.values()).check(CONFIG, "b" * 64)


def test_a_key_newer_than_the_run_has_its_default():
    values = {key: value for key, value in CONFIG.values().items() if key != "fraction-train"}
    Settings(1, "f", values).check(CONFIG, "f")
    with pytest.raises(UserError, match="fraction-train = 0.5 in place of 1.0"):
        Settings(1, "f", values).check(CONFIG.model_copy(update={"fraction_train": 0.5}), "f")


@pytest.mark.parametrize("text", ["", "[]", '{"run_id": 1}', "{"])
def test_damaged_settings_are_an_error(tmp_path, text):
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        read_settings(tmp_path)


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(UserError, match="found no .*settings.json; name the log-dir of a run"):
        read_settings(tmp_path)
