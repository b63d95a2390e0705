"""Seven defects of other pages for the choice of experts, each shown to be absent here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import ui.serve
from experts.saliency.measures import save_saliency
from models.moe_files.layout import read_moe_layout
from tests.support.command import run
from tests.support.saliency_samples import saliency_of_scores
from tests.ui.test_client import select


def kept(result: tuple) -> dict[str, list[int]]:
    return json.loads(Path(result[4]).read_text())["keep_map"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """Eight experts of falling saliency in one layer."""
    path = tmp_path_factory.mktemp("eight") / "eight.npz"
    save_saliency(saliency_of_scores([[8, 7, 6, 5, 4, 3, 2, 1]]), path)
    return path


def test_1_ignored_experts_are_passed_over_and_the_number_asked_for_is_removed(client, eight):
    assert kept(select(client, eight, n_prune=2, ignore_experts="6..7")) == {"0": [0, 1, 2, 3, 6, 7]}


def test_2_the_command_prunes_no_guarded_expert(client, page, tmp_path, capsys):
    *_, csv, _, _ = select(client, page.saliency, n_prune=2, selection_mode="model_wide", guard_top=75)
    assert "guard" not in Path(csv).read_text()
    out = tmp_path / "pruned"
    assert run(capsys, "prune", "--model", page.model, "--expert-list", csv, "--out", out, "--json").code == 0
    assert read_moe_layout(out).experts_per_layer == [3, 3]


def test_3_the_smallest_rank_keeps_the_best_and_no_layer_becomes_empty(client, eight):
    assert kept(select(client, eight, n_prune=2, min_rank="3", max_rank="4")) == {"0": [0, 1, 4, 5, 6, 7]}
    with pytest.raises(AppError, match="at most 2 experts in layer 0"):
        select(client, eight, n_prune=3, min_rank="3", max_rank="4")


@pytest.mark.parametrize("number", [8, 9, 1000])
def test_4_as_many_experts_as_there_are_is_an_error(client, eight, number):
    with pytest.raises(AppError, match=f"at most 7 experts in layer 0, got “Experts to remove” {number}"):
        select(client, eight, n_prune=number)


def test_5_ranks_of_several_files_are_no_saliency_file(client, page):
    result = select(client, page.saliency, page.other)
    assert [Path(path).suffix for path in result[3:5]] == [".csv", ".json"]
    assert result[5].startswith("fedgraft experts select --saliency ranked.npz --saliency other.npz ")
    with np.load(page.saliency) as stored:
        assert stored["freq"].tolist() == [[4, 3, 2, 1], [1, 2, 3, 4]]


def test_6_two_sessions_share_no_file(client, page):
    other = Client(page.address, verbose=False, download_files=False)
    mine = Client(page.address, verbose=False, download_files=False)
    paths = [select(each, page.saliency, n_prune=number)[3] for number, each in ((1, mine), (2, other))]
    names = [path["path"] if isinstance(path, dict) else str(path) for path in paths]
    assert Path(names[0]).parent != Path(names[1]).parent
    assert [Path(name).read_text().count("prune") for name in names] == [2, 4]
    for each in (mine, other):
        each.close()


def test_7_the_page_is_on_this_machine_only_and_writes_below_the_folder_of_runs_only(client, page, tmp_path):
    assert ui.serve.HOST == "127.0.0.1" and page.address.startswith("http://127.0.0.1:")
    select(client, page.saliency)
    for name in (str(tmp_path / "x"), "../x", "..", "a/b"):
        with pytest.raises(AppError, match="outputs are written to .*/runs/NAME only"):
            client.predict(str(page.model), "prune", name, False, "", api_name="/compress")
    with pytest.raises(AppError, match="is not in the list of choices"):
        client.predict(str(tmp_path), "prune", "x", False, "", api_name="/compress")
