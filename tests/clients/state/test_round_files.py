"""Files with one version per round."""

from __future__ import annotations

from clients.state.round_files import RoundFiles


def test_the_newest_state_before_a_round_is_found_and_two_are_kept(tmp_path):
    files = RoundFiles(tmp_path, "residual")
    assert not files.before(3).exists()
    for server_round in (2, 9, 10):
        files.after(server_round).touch()
    (tmp_path / "residual-x.safetensors").touch()
    (tmp_path / "residual.safetensors").touch()
    assert files.before(10) == files.after(9) and files.before(9) == files.after(2)
    assert files.before(99) == files.after(10)
    files.prune(10)
    kept = {
        "residual-9.safetensors",
        "residual-10.safetensors",
        "residual-x.safetensors",
        "residual.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_later_states_are_removed_with_the_round_that_is_repeated(tmp_path):
    files = RoundFiles(tmp_path, "assembler")
    for server_round in (1, 2, 3):
        files.after(server_round).touch()
    files.prune(2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "assembler-1.safetensors",
        "assembler-2.safetensors",
    }
