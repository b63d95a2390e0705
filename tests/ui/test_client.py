"""The page by its API: what a session selects, downloads and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from experts.selection.expert_list import CSV_FILE, JSON_FILE, load_expert_list
from models.moe_files.layout import read_moe_layout
from tests.support.command import run

FORM = {
    "model": None,
    "metric": "freq",
    "selection_mode": "per_layer",
    "action": "prune",
    "n_prune": 1,
    "min_rank": "",
    "max_rank": "",
    "ignore_experts": "",
    "guard_top": 0,
}


def select(client: Client, *files: Path, **fields) -> tuple:
    """Load files and select: heat map, summary, layers, CSV, JSON, command."""
    client.predict([handle_file(path) for path in files], api_name="/load_saliency")
    return client.predict(*{**FORM, **fields}.values(), api_name="/select_experts")


def test_a_file_ranked_by_hand_gives_its_keep_map_and_the_bytes_of_the_command(
    client, page, monkeypatch, capsys
):
    picture, summary, _, csv, listed, command = select(client, page.saliency, model=str(page.model))
    assert json.loads(picture)["marks"] == "kkkppkkk"
    assert json.loads(Path(listed).read_text())["keep_map"] == {"0": [0, 1, 2], "1": [1, 2, 3]}
    assert {layer: kept.tolist() for layer, kept in load_expert_list(Path(csv)).items()} == {
        0: [0, 1, 2],
        1: [1, 2, 3],
    }
    assert "2 layers, 6 experts kept, 2 pruned" in summary and "parameters" in summary
    assert command.splitlines() == [
        "fedgraft experts select --saliency ranked.npz --metric freq --n-prune 1 --out selection",
        f"fedgraft prune --model {page.model} --expert-list selection/{CSV_FILE} --out pruned",
    ]
    monkeypatch.chdir(page.saliency.parent)
    assert run(capsys, *command.splitlines()[0].split()[1:], "--overwrite").code == 0
    for name, downloaded in ((CSV_FILE, csv), (JSON_FILE, listed)):
        assert (page.saliency.parent / "selection" / name).read_bytes() == Path(downloaded).read_bytes()


@pytest.mark.parametrize(
    "fields",
    [
        {"selection_mode": "model_wide", "n_prune": 3, "metric": "reap", "guard_top": 30},
        {"action": "merge", "min_rank": "3", "max_rank": "7.5", "ignore_experts": "2..3", "metric": "ean"},
        {"action": "analyze", "n_prune": 0},
    ],
)
def test_two_files_and_every_field_give_the_bytes_of_the_command(client, page, monkeypatch, capsys, fields):
    *_, csv, listed, command = select(client, page.saliency, page.other, **fields)
    monkeypatch.chdir(page.saliency.parent)
    assert run(capsys, *command.splitlines()[0].split()[1:], "--overwrite").code == 0
    for name, downloaded in ((CSV_FILE, csv), (JSON_FILE, listed)):
        assert (page.saliency.parent / "selection" / name).read_bytes() == Path(downloaded).read_bytes()


def test_an_error_is_one_line_with_the_labels_of_the_page(client, page):
    client.predict([handle_file(page.saliency)], api_name="/load_saliency")
    with pytest.raises(AppError) as caught:
        client.predict(*{**FORM, "min_rank": "three"}.values(), api_name="/select_experts")
    assert str(caught.value.message) == "expected “Smallest rank” to be a number or empty, got 'three'"
    with pytest.raises(AppError, match="expected 1 to 4 saliency files, got 5"):
        client.predict([handle_file(page.saliency)] * 5, api_name="/load_saliency")


def test_two_files_are_compared_and_two_runs_are_listed(client, page):
    files = [handle_file(path) for path in (page.saliency, page.other)]
    picture, figures, *_ = client.predict(*files, "freq", api_name="/compare_files")
    assert json.loads(picture)["diverging"] is True and "risen 5, fallen 3, equal 0" in figures
    with pytest.raises(AppError, match="“Run” of the list, got none"):
        client.predict(None, None, api_name="/compare_runs")
    assert client.predict(None, 0, api_name="/show_run")[0].count("Choose a run") == 1


def test_a_prompt_is_continued_by_two_models_in_the_colors_of_their_experts(client, page):
    steps = client.submit(str(page.model), str(page.model), "abc", 4, 0, 1, api_name="/chat")
    shown = list(steps)
    assert any("3 tokens" in base and "waiting" in result for base, result in shown)
    base, result = shown[-1]
    assert "4 tokens" in base and "4 tokens" in result and "tokens/s" in base
    assert base.count("class='fg-token' title='expert ") == 4
    with pytest.raises(AppError, match="expected a prompt, got none"):
        client.predict(None, None, " ", 4, 0, 0, api_name="/chat")


def test_prune_writes_the_checkpoint_below_the_folder_of_runs(client, page):
    select(client, page.saliency)
    status, models = client.predict(str(page.model), "prune", "smaller", False, "", api_name="/compress")
    assert f"Wrote {page.runs / 'smaller'}" in status
    assert read_moe_layout(page.runs / "smaller").experts_per_layer == [3, 3]
    assert str(page.runs / "smaller") in str(models)
    with pytest.raises(AppError, match="“Name of the output” that is not taken"):
        client.predict(str(page.model), "prune", "smaller", False, "", api_name="/compress")
