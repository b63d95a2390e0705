from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.prompt_templates import PromptTemplate, load_template, takes, template_names

DOLLY = {"instruction": "Name a fruit.", "context": "Only red ones.", "response": "Cherry"}


def test_plain_with_and_without_context():
    plain = load_template("plain")
    assert plain.render(DOLLY) == "Name a fruit.\n\nOnly red ones.\n\nCherry"
    assert plain.render({**DOLLY, "context": "  "}) == "Name a fruit.\n\nCherry"
    assert plain.render({"instruction": "Name a fruit.", "response": "Cherry"}) == "Name a fruit.\n\nCherry"


def test_alpaca_columns_render_as_dolly_columns():
    alpaca = {"instruction": "Name a fruit.", "input": "Only red ones.", "output": "Cherry"}
    for name in template_names():
        assert load_template(name).render(alpaca) == load_template(name).render(DOLLY)
    text = load_template("alpaca").render(DOLLY)
    assert text.endswith(
        "### Instruction:\nName a fruit.\n\n### Input:\nOnly red ones.\n\n### Response:\nCherry"
    )
    assert "### Input" not in load_template("alpaca").render({**DOLLY, "context": None})


def test_ranges_are_those_of_the_response():
    text, (start, end) = load_template("alpaca").render_ranges({**DOLLY, "instruction": "Cherry"})
    assert text[start:end] == "Cherry" and text[:start].endswith("### Response:\n") and end == len(text)
    twice = PromptTemplate("own", "", "{response}|{instruction}|{response}.")
    assert twice.render_ranges({"instruction": "a", "response": "bc"}) == ("bc|a|bc.", (0, 2, 5, 7))


def test_braces_in_a_record_are_left_alone():
    record = {"instruction": "Print {response} {0} {", "response": r"\1 {context} }"}
    assert load_template("plain").render(record) == "Print {response} {0} {\n\n\\1 {context} }"


def test_auto_is_alpaca_and_both_come_with_the_project():
    assert load_template("auto") == load_template() == load_template("alpaca")
    assert {"alpaca", "plain"} <= set(template_names())


def test_takes():
    assert takes(DOLLY) and takes({"instruction": "", "output": ""})
    assert not takes({"instruction": "a"}) and not takes({"response": "a"}) and not takes({"text": "a"})


def test_own_template_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "with_context": "{context}|{instruction}|{response}",
                "without_context": "{instruction}:{response}",
            }
        )
    )
    assert load_template(str(path)).render(DOLLY) == "Only red ones.|Name a fruit.|Cherry"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"with_context": "{instruction}", "without_context": "{instruction} {response}"}'],
)
def test_broken_template_file_is_one_line(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match="mine.json") as caught:
        load_template(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_template_and_unusable_record():
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        load_template("alpacca")
    with pytest.raises(UserError, match="got the columns text, answer"):
        load_template("plain").render({"text": "a", "answer": "b"})
