"""Chats by the tokenizer's chat template, against masks written by hand."""

from __future__ import annotations

import warnings

import pytest
from transformers import AutoTokenizer

from configs.errors import UserError
from federated.data.answers import AnsweredText
from federated.data.blocks import pack_blocks
from federated.data.chat_template import ChatTemplate
from tests.support.byte_tokenizer import byte_tokenizer

TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
ASKED = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
ADDED = TURNS + "{{ m.content }}{{ eos_token }}\n" + ASKED
MARKED = (
    TURNS + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}" + ASKED
)
# The last answer is written differently from those before it, so that no chat starts with the text of a shorter one.
CHANGED = TURNS + "{% if loop.last %}!{% endif %}{{ m.content | trim }}{{ eos_token }}\n" + ASKED
REFUSES = "{{ raise_exception('roles must alternate') }}"

CHAT = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Wh\u00fc?"},
    {"role": "assistant", "content": "na\u00efve  "},
]
TEXT = (
    "[system]Be.</s>\n[user]yes</s>\n[assistant]yes</s>\n[user]Wh\u00fc?</s>\n[assistant]na\u00efve  </s>\n"
)
WITH_LOSS = [("[assistant]", "yes</s>"), ("[assistant]", "na\u00efve  </s>")]


def template(text: str | None) -> ChatTemplate:
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = text
    return ChatTemplate(lambda: tokenizer)


def answers(rendered: AnsweredText) -> list[str]:
    return [rendered.text[a:b] for a, b in zip(rendered.ranges[::2], rendered.ranges[1::2], strict=True)]


@pytest.mark.parametrize("text", [ADDED, MARKED])
def test_answers_are_the_assistants_turns_and_the_tokens_that_end_them(text):
    rendered = template(text).render(CHAT, "here")
    assert rendered.text == TEXT, "without the BOS, which blocks add"
    assert answers(rendered) == ["yes</s>", "na\u00efve  </s>"]
    starts = [TEXT.index("[assistant]") + 11, TEXT.rindex("[assistant]") + 11]
    assert list(rendered.ranges[::2]) == starts


@pytest.mark.parametrize("text", [ADDED, MARKED])
def test_tokens_with_a_loss_are_those_of_a_mask_written_by_hand(text):
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    short = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    blocks = pack_blocks([template(text).render(short, "here")], tokenizer, block_size=32)
    #           BOS [user]ab EOS \n [assistant]  c d EOS \n
    expected = "0" + "0" * 8 + "0" + "0" + "0" * 11 + "11" + "1" + "0"
    found = (blocks.labels[0] != -100).int().tolist()
    assert "".join(map(str, found)) == expected + "0" * (32 - len(expected))
    labeled = blocks.labels[0][blocks.labels[0] != -100]
    assert tokenizer.decode(labeled) == "cd</s>"


def test_the_mask_is_that_of_the_tokenizer_where_the_template_marks_answers():
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = MARKED
    reference = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    blocks = pack_blocks([template(MARKED).render(CHAT, "here")], tokenizer, block_size=128)
    size = len(reference["input_ids"])
    assert blocks.input_ids[0, :size].tolist() == reference["input_ids"]
    assert (blocks.labels[0, :size] != -100).int().tolist() == reference["assistant_masks"]


def test_where_turns_change_the_text_before_them_answers_are_the_contents():
    rendered = template(CHANGED).render(CHAT, "here")
    assert answers(rendered) == ["yes</s>", "na\u00efve</s>"]
    assert rendered.ranges[0] == rendered.text.index("[assistant]") + 11, "not the user's yes"
    with pytest.raises(UserError, match="write the answer of turn 3, got a text without it in here"):
        template(CHANGED.replace("m.content", "m.content[0]")).render(CHAT, "here")


def test_a_chat_may_start_with_the_assistant_and_end_with_the_user():
    rendered = template(ADDED).render([CHAT[2], CHAT[1]], "here")
    assert rendered.text == "[assistant]yes</s>\n[user]yes</s>\n" and rendered.ranges == (11, 18)


def test_without_a_need_of_answers_there_are_no_ranges():
    assert template(ADDED).render(CHAT, "here", answers=False) == AnsweredText(TEXT, ())


def test_a_chat_that_the_template_refuses_is_named():
    with pytest.raises(UserError, match="takes, got: roles must alternate in f, line 7"):
        template(REFUSES).render(CHAT, "f, line 7")


def test_without_a_template_turns_have_a_plain_form_which_a_warning_says_once():
    chat = template(None)
    with pytest.warns(
        UserWarning, match="no chat template in the tokenizer: chats are written as 'User: ...'"
    ):
        rendered = chat.render(CHAT[:3], "here")
    assert rendered.text == "System: Be.\n\nUser: yes\n\nAssistant: yes</s>"
    assert answers(rendered) == ["yes</s>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat.render(CHAT[:3], "here")
        assert ChatTemplate().render(CHAT[1:3], "here").text == "User: yes\n\nAssistant: yes"


def test_the_template_of_a_real_model(smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    rendered = ChatTemplate(lambda: tokenizer).render(CHAT[1:], "here")
    assert answers(rendered) == ["yes<|im_end|>", "na\u00efve  <|im_end|>"]
    blocks = pack_blocks([rendered], tokenizer, block_size=128)
    tokens, size = tokenizer.apply_chat_template(CHAT[1:])["input_ids"], int(blocks.labels.ne(-100).sum())
    assert blocks.input_ids[0, : len(tokens)].tolist() == tokens
    yes, end = tokenizer.encode("yes")[0], tokenizer.eos_token_id
    expected = [yes, end, *tokenizer.encode("na\u00efve  "), end]
    assert blocks.labels[blocks.labels != -100].tolist() == expected and size == len(expected)
