from __future__ import annotations

import json
import math
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from configs.errors import UserError
from federated.data.answers import RANGES, documents_of
from federated.data.chat_template import ChatTemplate
from federated.data.documents import (
    absolute_sources,
    is_wikimix,
    load_documents,
    source_labels,
)
from federated.data.field_text import is_nan
from tests.conftest import shared_path
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.paths import SHARED


def write(path: Path, *records: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count: int, **fields: object) -> list[dict[str, object]]:
    return [{"text": f"text {number}", **fields} for number in range(count)]


@pytest.fixture
def wikimix(monkeypatch) -> None:
    """A generator of the same form as the real one, in its place."""
    module = types.ModuleType("federated.data.wikimix")

    def documents(domain: str, count: int, *, seed: int = 0, split: str = "train") -> list[str]:
        return [f"{domain} {split} {seed} {number}" for number in range(count)]

    module.DOMAINS = ("prose", "python", "recipes")  # type: ignore[attr-defined]
    module.documents = documents  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "federated.data.wikimix", module)


def splits(documents: Dataset) -> Counter[tuple[str, str]]:
    return Counter(zip(documents["domain"], documents["split"], strict=True))


def test_the_last_tenth_of_each_domain_is_held_out(tmp_path):
    source = write(tmp_path / "mix.jsonl", *numbered(25, domain="a"), *numbered(3, domain="b"))
    documents = load_documents([source])
    assert splits(documents) == {("a", "train"): 23, ("a", "valid"): 2, ("b", "train"): 2, ("b", "valid"): 1}
    held_out = [row["text"] for row in documents if row["split"] == "valid"]
    assert held_out == ["text 23", "text 24", "text 2"]


def test_a_folder_keeps_its_split_and_gives_the_domain_its_name(tmp_path):
    write(tmp_path / "cooking" / "train.jsonl", *numbered(4))
    write(tmp_path / "cooking" / "valid.jsonl", {"text": "held out"})
    documents = load_documents([str(tmp_path / "cooking")])
    assert splits(documents) == {("cooking", "train"): 4, ("cooking", "valid"): 1}
    assert documents[4]["text"] == "held out"


def test_the_column_split_of_records_holds_out_and_what_has_no_split_is_said(tmp_path, recwarn):
    names = ["training", "dev", "Test", None, "train", "eval", "development"]
    rows = [{"text": f"text {number}", "split": name} for number, name in enumerate(names)]
    documents = load_documents([write(tmp_path / "a.jsonl", *rows)])
    assert list(zip(documents["text"], documents["split"], strict=True)) == [
        ("text 0", "train"),
        ("text 1", "valid"),
        ("text 4", "train"),
    ]
    assert "split word" not in documents.column_names
    assert ["2 of 7 records" in str(note.message) for note in recwarn] == [True]


def test_test_records_are_held_out_where_none_is_valid(tmp_path, recwarn):
    rows = [{"text": name, "split": name} for name in ("train", "test", "evaluation")]
    documents = load_documents([write(tmp_path / "a.jsonl", *rows)])
    assert documents["split"][:] == ["train", "valid", "valid"] and not recwarn.list


def test_files_decide_before_the_column_split(tmp_path, recwarn):
    write(tmp_path / "a" / "train.jsonl", {"text": "x", "split": "valid"}, {"text": "y", "split": "train"})
    write(tmp_path / "a" / "dev.jsonl", {"text": "z", "split": "train"})
    documents = load_documents([str(tmp_path / "a")])
    assert documents["split"][:] == ["train", "train", "valid"] and not recwarn.list


def test_a_source_read_as_one_whole_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"a.jsonl': the last 10 % .*\(2 of 20 documents\)") as notes:
        load_documents([write(tmp_path / "a.jsonl", *numbered(20, split="train"))])
    assert len(notes) == 1 and "\n" not in str(notes[0].message)


def test_val_beside_train_is_held_out():
    documents = load_documents([str(shared_path("data/awkward/split_val"))])
    for split, first in {"train": "TRAIN ", "valid": "VAL "}.items():
        texts = [row["text"] for row in documents if row["split"] == split]
        assert texts and all(text.startswith(first) for text in texts)


def test_own_domains_count_only_where_all_records_have_one(tmp_path):
    some = write(tmp_path / "some.jsonl", *numbered(2, domain="own"), {"text": "without"})
    every = write(tmp_path / "every.jsonl", *numbered(2, domain="own"), {"text": " \n"})
    assert splits(load_documents([some, every])).keys() == {
        ("some", "train"),
        ("some", "valid"),
        ("own", "train"),
        ("own", "valid"),
    }


def test_blank_documents_are_dropped(tmp_path):
    source = write(
        tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": "b"}
    )
    with pytest.warns(UserWarning, match="3 of 5 records of .*a.jsonl' have no text or no answer"):
        assert load_documents([source])["text"][:] == ["a", "b"]


def test_scalar_columns_are_kept_and_nested_ones_flattened(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {
            "text": "a",
            "meta": {"pile_set_name": "Code", "deep": {"n": 1}},
            "tags": ["x"],
            "score": 1,
            "split": "x",
        },
        {"text": "b", "meta": {"pile_set_name": None}, "score": "high"},
    )
    other = write(tmp_path / "b.jsonl", {"text": "c", "ok": True}, {"text": "d", "ok": False})
    documents = load_documents([source, other])
    assert documents.column_names == [
        "text",
        "domain",
        "split",
        "meta.pile_set_name",
        "meta.deep.n",
        "score",
        "ok",
    ]
    assert documents["meta.pile_set_name"][:] == ["Code", None, None, None]
    assert documents["meta.deep.n"][:] == [1, None, None, None]
    assert documents["score"][:] == ["1", "high", None, None]
    assert documents["ok"][:] == [None, None, True, False]
    assert documents["split"][:] == ["train", "valid"] * 2


def test_values_that_arrow_cannot_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "half \\ud83d pair \\ud83d\\ude00", "id": 123456789012345678901}\n{"text": "b", "id": 1}\n'
    )
    documents = load_documents([str(path)])
    assert documents["text"][0] == "half \ufffd pair \U0001f600"
    assert documents["id"][:] == ["123456789012345678901", "1"]


def test_instruction_records_go_through_the_template(tmp_path):
    dolly = {"instruction": "Ask", "context": "", "response": "Answer", "category": "qa"}
    alpaca = {"instruction": "Ask", "input": "Given", "output": "Answer"}
    source = write(tmp_path / "a.jsonl", dolly, alpaca)
    documents = load_documents([source], template="plain")
    assert documents["text"][:] == ["Ask\n\nAnswer", "Ask\n\nGiven\n\nAnswer"]
    assert documents.column_names == ["text", "domain", "split", "category"]
    assert "### Response:\nAnswer" in load_documents([source])["text"][0]


def test_answers_of_any_scalar_and_missing_contexts(tmp_path):
    rows = [{"instruction": "Ask", "input": math.nan, "output": value} for value in (0, False, 1.5, "yes")]
    rows += [{"instruction": 7, "input": 0, "output": "", "response": 0}]
    documents = load_documents([write(tmp_path / "a.jsonl", *rows)], template="plain")
    assert documents["text"][:] == ["Ask\n\n0", "Ask\n\nfalse", "Ask\n\n1.5", "Ask\n\nyes", "7\n\n0\n\n0"]


def test_nan_is_a_missing_value_of_every_column(tmp_path):
    rows = [{"text": "a", "score": math.nan, "domain": "x"}, {"text": "b", "score": "high", "domain": "x"}]
    assert load_documents([write(tmp_path / "a.jsonl", *rows)])["score"][:] == [None, "high"]


@pytest.mark.parametrize("empty", ["", "  ", None, math.nan])
def test_records_without_an_answer_are_dropped_and_counted(tmp_path, empty):
    rows = [{"instruction": "Ask", "output": value} for value in ("yes", empty, "no", empty)]
    source = write(tmp_path / "a.jsonl", *rows)
    with pytest.warns(UserWarning, match="2 of 4 records of .*a.jsonl' have no text or no answer"):
        assert load_documents([source], template="plain")["text"][:] == ["Ask\n\nyes", "Ask\n\nno"]


def awkward(name: str) -> tuple[str, list[dict]]:
    """A file of awkward records and its records."""
    path = shared_path(f"data/awkward/{name}")
    return str(path), [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["int", "bool"])
def test_awkward_labels_are_text(name):
    source, records = awkward(f"labels/{name}.jsonl")
    texts = load_documents([source], template="plain")["text"][:]
    assert texts == [f"{record['instruction']}\n\n{json.dumps(record['output'])}" for record in records]


def test_awkward_integers_as_text():
    source, records = awkward("labels/textint.jsonl")
    numbers = [record["text"] for record in records if isinstance(record["text"], int)]
    texts = load_documents([source])["text"][:]
    assert numbers and len(texts) == len(records) and {str(number) for number in numbers} <= set(texts)


def test_awkward_empty_answers():
    source, records = awkward("labels/empty_out.jsonl")
    with pytest.warns(UserWarning, match="10 of 20 records"):
        texts = load_documents([source], template="plain")["text"][:]
    assert texts == [f"{each['instruction']}\n\n{each['output']}" for each in records if each["output"]]


def test_awkward_nan_is_no_context():
    source, records = awkward("nan/alpaca_nan.jsonl")
    texts = load_documents([source], template="plain")["text"][:]
    missing = [(text, record) for text, record in zip(texts, records, strict=True) if is_nan(record["input"])]
    assert missing
    assert all(text == f"{record['instruction']}\n\n{record['output']}" for text, record in missing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels/list.jsonl", "column 'output', got output with a list in .*list.jsonl, line 1"),
        ("nan/text_nan.jsonl", "column 'text', got NaN in .*text_nan.jsonl, line {line}"),
    ],
)
def test_awkward_values_that_are_no_text_name_column_and_line(name, message):
    source, records = awkward(name)
    line = next((number for number, row in enumerate(records, 1) if is_nan(row.get("text"))), 0)
    with pytest.raises(UserError, match=message.format(line=line)) as caught:
        load_documents([source])
    assert "\n" not in str(caught.value)


def test_text_wins_over_a_template_unless_one_is_asked_for(tmp_path):
    source = write(tmp_path / "a.jsonl", *[{"text": "whole", "instruction": "Ask", "response": "Answer"}] * 2)
    assert load_documents([source])["text"][0] == "whole"
    assert load_documents([source], template="plain")["text"][0] == "Ask\n\nAnswer"


def test_wikimix_domains_and_splits(wikimix):
    documents = load_documents(["wikimix"], wikimix_documents=20, seed=7)
    assert splits(documents) == {
        (name, split): count
        for name in ("prose", "python", "recipes")
        for split, count in (("train", 20), ("valid", 2))
    }
    assert documents[0]["text"] == "prose train 7 0" and documents[20]["text"] == "prose valid 7 0"
    some = load_documents(["wikimix:recipes, prose"], wikimix_documents=3)
    assert splits(some).keys() == {
        ("recipes", "train"),
        ("recipes", "valid"),
        ("prose", "train"),
        ("prose", "valid"),
    }
    with pytest.raises(UserError, match="got 'pyton' .did you mean 'python'"):
        load_documents(["wikimix:pyton"])


def test_source_labels_are_distinct(tmp_path):
    paths = [
        write(tmp_path / name, {"text": "a"})
        for name in ("a/x.jsonl", "b/x.jsonl", "a/train.jsonl", "c/train.json")
    ]
    labels = source_labels([*paths, paths[0], paths[0], "owner/name", str(tmp_path / "a")])
    assert labels == ["x", "b-x", "a", "c", "a-x", "a-x-2", "name", f"{tmp_path.name}-a"]


def test_absolute_sources(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "wikimix").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_sources(["a.jsonl", "wikimix", "owner/name"]) == [
        str(tmp_path / "a.jsonl"),
        "wikimix",
        "owner/name",
    ]
    assert is_wikimix("wikimix:prose") and not is_wikimix("./wikimix") and not is_wikimix("wikimixed")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "answer": "b"}, "got prompt, answer in .*a.jsonl, line 1"),
        ({}, "got no columns"),
        ({"text": ["a"]}, "got text"),
        ({"text": {"a": 1}}, "column 'text', got text with an object in .*a.jsonl, line 1"),
        ({"text": math.nan}, "column 'text', got NaN in .*a.jsonl, line 1"),
        ({"instruction": ["a"], "output": "b"}, "column 'instruction', .* line 1"),
        ({"instruction": "a", "input": {}, "output": "b"}, "column 'input', .* line 1"),
        ({"text": "  "}, "expected documents in .*a.jsonl.*, got none"),
    ],
)
def test_unusable_records_are_one_line(tmp_path, record, message):
    with pytest.raises(UserError, match=message) as caught:
        load_documents([write(tmp_path / "a.jsonl", record)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt_completion"])
def test_awkward_chats(name):
    path = shared_path("data/awkward/chat") / f"{name}.jsonl"
    documents = load_documents([str(path)])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(documents) == len(records) == 20 and RANGES not in documents.column_names
    assert not {"messages", "prompt", "completion", "conversations"} & set(documents.column_names)
    answered = load_documents([str(path)], loss_on="answers")
    assert answered.remove_columns(RANGES)[:] == documents[:]
    for document, record in zip(documents_of(answered), records, strict=True):
        turns = record.get("messages") or record.get("conversations")
        last = turns[-1] if turns else record
        answer = last.get("content") or last.get("value") or last["completion"]
        start, end = document.ranges
        assert document.text[start:end] == answer and document.text[:start].endswith("\n\nAssistant: ")


def test_chats_without_an_answer_are_dropped_and_counted(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(
        tmp_path / "a.jsonl", *[{"messages": turns}] * 3, {"messages": turns[:1]}, {"messages": []}
    )
    with pytest.warns(UserWarning, match="2 of 5 records of .* have no text or no answer: they are left out"):
        assert load_documents([source])["text"][:] == ["User: a\n\nAssistant: b"] * 3


def test_the_tokenizers_chat_template_writes_chats(tmp_path):
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source = write(tmp_path / "a.jsonl", *[{"question": "1+1", "answer": 2, "id": n} for n in range(2)])
    documents = load_documents([source], chat=ChatTemplate(lambda: tokenizer))
    assert documents["text"][:] == ["<user>1+1<assistant>2"] * 2
    assert documents["id"][:] == [0, 1] and "answer" not in documents.column_names


def test_a_malformed_chat_is_an_error_that_names_record_and_turn(tmp_path):
    source = write(tmp_path / "a.jsonl", {"messages": [{"role": "bot", "content": "a"}]})
    with pytest.raises(UserError, match="got 'bot' in .*a.jsonl, line 1, turn 1"):
        load_documents([source])
    Dataset.from_list([{"messages": [{"role": "bot", "content": "a"}]}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="got 'bot' in .*saved, record 1, turn 1"):
        load_documents([str(tmp_path / "saved")])


def test_plain_text_has_no_answers(tmp_path, wikimix):
    for source in (write(tmp_path / "a.jsonl", {"text": "a"}), "wikimix"):
        with pytest.raises(UserError, match="expected records with answers .* set loss-on to all"):
            load_documents([source], loss_on="answers")
    with pytest.raises(UserError, match="expected loss-on to be all or answers, got 'answer'"):
        load_documents([source], loss_on="answer")


def test_empty_sources_are_refused(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.json"):
        with pytest.raises(UserError, match=f"expected documents in .*{name}"):
            load_documents([write(tmp_path / name)])
    with pytest.raises(UserError, match="at least one data source"):
        load_documents([])
    write(tmp_path / "held" / "train.jsonl")
    write(tmp_path / "held" / "valid.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="expected documents in .*held"):
        load_documents([str(tmp_path / "held")])


@pytest.mark.parametrize("name", ["stories", "recipes", "math_gsm8k", "medical_qa", "dolly_shepherd"])
def test_real_data(name):
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent")
    lines = {
        split: sum(
            (len(json.loads(path.read_text())) if path.suffix == ".json" else path.read_text().count("\n"))
            for path in folder.iterdir()
            if any(word in path.name for word in words)
        )
        for split, words in {"train": ("train",), "valid": ("valid", "test")}.items()
    }
    documents = load_documents([str(folder)])
    assert splits(documents) == {(name, split): count for split, count in lines.items()}


def test_the_real_wikimix_fits():
    documents = load_documents(["wikimix:recipes,prose"], wikimix_documents=10, seed=1)
    assert splits(documents) == {
        (name, split): count
        for name in ("recipes", "prose")
        for split, count in (("train", 10), ("valid", 1))
    }
    assert len(set(documents["text"])) == 22
