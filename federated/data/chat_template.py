"""Text of a chat by the chat template of a tokenizer, and the character ranges of its answers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

from jinja2 import TemplateError

from configs.errors import UserError, first_line
from federated.data.answers import AnsweredText
from federated.data.chats import Turn

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
_BAD_CHAT = (TemplateError, ValueError, TypeError, KeyError, IndexError)


class ChatTemplate:
    """Chat template of a tokenizer.

    A tokenizer without a template writes turns in plain form: ``System: ...``, ``User: ...`` and ``Assistant: ...``
    with a blank line between, the EOS token after each answer. A warning says so.

    Args:
        open_tokenizer: loads the tokenizer, at the first chat; None: the plain form without an EOS token.
    """

    def __init__(self, open_tokenizer: Callable[[], Any] | None = None) -> None:
        self._open_tokenizer = open_tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._open_tokenizer() if self._open_tokenizer else None
        if tokenizer is not None and not tokenizer.chat_template:
            warnings.warn(
                "no chat template in the tokenizer: chats are written as 'User: ...' and 'Assistant: ...', "
                "a blank line between turns",
                stacklevel=2,
            )
        return tokenizer

    def render(self, turns: Sequence[Turn], where: str, *, answers: bool = True) -> AnsweredText:
        """Text of a chat, without a BOS token at its start: blocks add one to each document.

        An answer is what the model has to generate: the content of an assistant's turn and the token that ends it. Its
        range is that of the template's ``{% generation %}`` blocks; of a template without, what a turn adds to the
        rendered turns before it and the generation prompt; where turns change the text before them, its content.

        Args:
            turns: at least one turn.
            where: location of the record, for messages.
            answers: whether to find the ranges of the answers; none are returned else.

        Raises:
            UserError: a chat that the template does not take, or an answer that is not found in its text.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            return self._plain(turns)
        try:
            text = self._text(turns)
            ranges = list(self._ranges(turns, text, where)) if answers else []
        except _BAD_CHAT as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"expected a chat that the tokenizer's chat template takes, got: {first_line(error)} in {where}"
            ) from None
        start = self._tokenizer.bos_token or self._tokenizer.eos_token or ""
        cut = len(start) if text.startswith(start) else 0
        return AnsweredText(text[cut:], tuple(max(0, at - cut) for pair in ranges for at in pair))

    def _plain(self, turns: Sequence[Turn]) -> AnsweredText:
        end = (self._tokenizer.eos_token if self._tokenizer is not None else None) or ""
        text, ranges = "", []
        for turn in turns:
            text += ("\n\n" if text else "") + turn["role"].capitalize() + ": "
            if turn["role"] == "assistant":
                ranges += [len(text), len(text) + len(turn["content"] + end)]
                text += turn["content"] + end
            else:
                text += turn["content"]
        return AnsweredText(text, tuple(ranges))

    def _text(self, turns: Sequence[Turn], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(list(turns), tokenize=False, **options)

    def _ranges(self, turns: Sequence[Turn], text: str, where: str) -> Iterator[tuple[int, int]]:
        """Start and end of each answer in the rendered ``text``."""
        if _MARKS_ANSWERS.search(self._tokenizer.get_chat_template()):
            return self._marked_ranges(turns)
        added = [
            self._added_range(turns, number, text)
            for number, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
        found = [each for each in added if each is not None]
        return iter(found) if len(found) == len(added) else self._content_ranges(turns, text, where)

    def _marked_ranges(self, turns: Sequence[Turn]) -> Iterator[tuple[int, int]]:
        """Ranges of the template's ``{% generation %}`` blocks, by the assistant mask of the tokenizer."""
        encoded = self._tokenizer.apply_chat_template(
            list(turns),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marked = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        for answered, run in groupby(marked, key=itemgetter(0)):
            offsets = [offset for _, offset in run]
            if answered:
                yield offsets[0][0], offsets[-1][1]

    def _added_range(self, turns: Sequence[Turn], number: int, text: str) -> tuple[int, int] | None:
        """Range that turn ``number`` adds to the text of those before it; None where it changes that text."""
        if not number:
            return None
        prompt = self._text(turns[:number], add_generation_prompt=True)
        whole = text if number == len(turns) - 1 else self._text(turns[: number + 1])
        if not (text.startswith(whole) and whole.startswith(prompt)):
            return None
        return len(prompt), len(whole.rstrip())

    def _content_ranges(self, turns: Sequence[Turn], text: str, where: str) -> Iterator[tuple[int, int]]:
        """Ranges of the contents of the assistant's turns, and of the EOS token right after each."""
        at, eos = 0, self._tokenizer.eos_token or ""
        for number, turn in enumerate(turns, start=1):
            content = turn["content"].strip()
            found = text.find(content, at)
            if found < 0 and turn["role"] == "assistant":
                raise UserError(
                    f"expected the chat template to write the answer of turn {number}, got a text without it in {where}"
                )
            at = found + len(content) if found >= 0 else at
            if turn["role"] == "assistant":
                yield found, at + (len(eos) if text.startswith(eos, at) else 0)
