from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import Dataset

from clients.state.run_documents import copied_documents

ROWS = [{"text": f"document {number}", "domain": "a", "split": "train", "stars": None} for number in range(5)]


def test_the_sources_are_read_once(tmp_path):
    documents = Dataset.from_list(ROWS)
    path = tmp_path / "run" / "documents.arrow"
    assert copied_documents(path, lambda: documents).to_list() == ROWS
    again = copied_documents(path, lambda: pytest.fail("the sources were read twice"))
    assert again.to_list() == ROWS and again.features == documents.features
    assert again.shuffle(seed=3).to_list() == documents.shuffle(seed=3).to_list()
    assert sorted(each.name for each in path.parent.iterdir()) == ["documents.arrow", "documents.lock"]


def test_one_of_several_processes_reads_the_sources(tmp_path):
    reads = []

    def load() -> Dataset:
        reads.append(1)
        time.sleep(0.05)
        return Dataset.from_list(ROWS)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: copied_documents(tmp_path / "documents.arrow", load), range(4)))
    assert len(reads) == 1 and all(each.to_list() == ROWS for each in found)


@pytest.mark.parametrize("kept", [0, 0.5, 0.98])
def test_a_truncated_copy_is_written_again(tmp_path, kept):
    path = tmp_path / "documents.arrow"
    copied_documents(path, lambda: Dataset.from_list(ROWS))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert copied_documents(path, lambda: Dataset.from_list(ROWS)).to_list() == ROWS
    assert path.read_bytes() == whole


def test_without_room_the_documents_are_those_of_the_sources(tmp_path):
    (tmp_path / "file").write_text("")
    assert copied_documents(tmp_path / "file" / "copy", lambda: Dataset.from_list(ROWS)).to_list() == ROWS
