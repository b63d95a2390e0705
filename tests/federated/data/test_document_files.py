from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from configs.errors import UserError
from federated.data import document_files
from federated.data.document_files import read_source
from tests.conftest import shared_path


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(source: Path | str) -> dict[str, list[str]]:
    return {split: [record["text"] for _, record in part] for split, part in read_source(str(source)).items()}


def test_a_folder_keeps_train_and_valid_apart(tmp_path):
    write(tmp_path / "train-0.jsonl", {"text": "a"})
    write(tmp_path / "train-1.jsonl", {"text": "b"})
    write(tmp_path / "validation.jsonl", {"text": "c"})
    assert texts(tmp_path) == {"train": ["a", "b"], "valid": ["c"]}


def test_test_files_are_held_out_only_where_there_is_no_valid_file(tmp_path):
    write(tmp_path / "local_training_0.json", {"text": "a"})
    write(tmp_path / "global_test.json", {"text": "b"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["b"]}
    write(tmp_path / "valid.json", {"text": "c"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["c"]}


@pytest.mark.parametrize(
    ("train", "held_out"), [("train", "val"), ("training", "dev"), ("Train", "TEST"), ("train.a", "eval_0")]
)
def test_split_words_of_file_names(tmp_path, train, held_out):
    write(tmp_path / f"{train}.jsonl", {"text": "a"})
    write(tmp_path / f"{held_out}.jsonl", {"text": "b"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["b"]}


def test_files_of_one_stem_are_all_read_and_one_without_a_split_word_is_left_out_aloud(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "train.json", {"text": "b"})
    write(tmp_path / "dev.jsonl", {"text": "c"})
    write(tmp_path / "more.jsonl", {"text": "d"})
    with pytest.warns(UserWarning, match="'more': it is left out of"):
        assert texts(tmp_path) == {"train": ["b", "a"], "valid": ["c"]}


def test_a_folder_without_a_split_is_one_whole(tmp_path):
    write(tmp_path / "latest.jsonl", {"text": "a"})
    write(tmp_path / "constrained.jsonl", {"text": "b"})
    (tmp_path / "notes.md").write_text("not read")
    assert texts(tmp_path) == {"": ["b", "a"]}


def test_datasets_saved_to_disk(tmp_path):
    part = Dataset.from_dict({"text": ["a", "b"]})
    part.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(str(tmp_path / "two"))
    DatasetDict({"training": part, "dev": part.select([0])}).save_to_disk(str(tmp_path / "three"))
    assert texts(tmp_path / "one") == {"": ["a", "b"]}
    assert texts(tmp_path / "two") == {"train": ["a", "b"], "valid": ["b"]}
    assert texts(tmp_path / "three") == {"train": ["a", "b"], "valid": ["a"]}


def test_a_folder_that_load_dataset_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(folder / "train.parquet"))
    Dataset.from_dict({"text": ["c"]}).to_parquet(str(folder / "validation.parquet"))
    assert texts(folder) == {"train": ["a", "b"], "valid": ["c"]}


def test_a_hub_id_goes_to_load_dataset_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})

    monkeypatch.setattr(document_files.datasets, "load_dataset", load_dataset)
    assert texts("owner/name:small") == {"": ["a"]} and texts("wikitext") == {"": ["a"]}
    assert asked == [("owner/name", "small"), ("wikitext", None)]


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    def load_dataset(name, config):
        raise ConnectionError("no such dataset\nand a long tail")

    monkeypatch.setattr(document_files.datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="got 'owner/name': no such dataset$"):
        read_source("owner/name")
    for source in (str(tmp_path / "none"), "none.jsonl", "owner/none.txt", "a b"):
        with pytest.raises(UserError, match="expected an existing file or folder or a hub dataset id"):
            read_source(source)
    with pytest.raises(UserError, match="got an empty one"):
        read_source("")


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty") as caught:
        read_source(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_sub_folders_are_read_and_name_splits_after_the_file(tmp_path):
    write(tmp_path / "train" / "deep" / "part-0.JSONL", {"text": "a"})
    write(tmp_path / "train" / "part-1.ndjson", {"text": "b"})
    write(tmp_path / "validation" / "part-0.jsonl", {"text": "c"})
    write(tmp_path / "train" / "test.jsonl", {"text": "d"})
    assert texts(tmp_path) == {"train": ["a", "b"], "valid": ["c"]}


def test_a_downloaded_dataset_repository(tmp_path):
    for name in ("README.md", "LICENSE", "LICENSE.txt", "readme.txt", ".gitattributes", "load.py", "a.png"):
        (tmp_path / name).write_text("text: no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    write(tmp_path / ".cache" / "huggingface" / "x.jsonl", {"text": "hidden"})
    (tmp_path / "data").mkdir()
    for part, values in {
        "train-00000-of-00002": ["a"],
        "train-00001-of-00002": ["b"],
        "test-0": ["c"],
    }.items():
        Dataset.from_dict({"text": values}).to_parquet(str(tmp_path / "data" / f"{part}.parquet"))
    assert texts(tmp_path) == {"train": ["a", "b"], "valid": ["c"]}


def test_an_unknown_file_beside_data_is_one_clear_error(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    (tmp_path / "more.docx").write_bytes(b"x")
    with pytest.raises(
        UserError, match="expected only .txt, .* files in .*, got .*more.docx'; convert it"
    ) as caught:
        read_source(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_awkward_snapshot():
    pyarrow = pytest.importorskip("pyarrow.parquet")
    folder = shared_path("data/awkward/snapshot")
    expected = {
        split: pyarrow.read_table(folder / "data" / f"{name}-00000-of-00001.parquet")["text"].to_pylist()
        for split, name in {"train": "train", "valid": "validation"}.items()
    }
    assert texts(folder) == expected and [len(part) for part in expected.values()] == [40, 10]
