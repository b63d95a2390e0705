"""Streamed generation by an opened model, with tokens per second and the expert of each token."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from models.runtime.generation import continue_prompt
from ui.chat.experts_of_tokens import recording_experts


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Answer:
    """Text of one model so far.

    Attributes:
        tokens: text of each new token.
        experts: expert of each token, -1 for none; empty for a model without experts.
        seconds: time since the first token was asked for.
    """

    tokens: list[str] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def open_model(folder: Path) -> Opened:
    """Open a checkpoint on the CPU or CUDA, in the precision that the device computes fastest."""
    from configs.choices import Precision
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.runtime.precision import choose_device

    model = load_causal_lm(str(folder), precision=Precision.AUTO, device=choose_device("auto"))
    return Opened(model.eval(), load_tokenizer(str(folder)))


def stream_answer(
    opened: Opened, prompt: str, *, max_new_tokens: int, temperature: float, layer: int, seed: int = 0
) -> Iterator[Answer]:
    """Generate after a prompt; yields the answer after every token. Closing the iterator ends the generation.

    Args:
        opened: model and tokenizer.
        prompt: text.
        max_new_tokens: most new tokens.
        temperature: 0 for greedy decoding.
        layer: index, among the layers with experts, of the layer whose experts are recorded.
        seed: of the sampling.

    Raises:
        UserError: as ``continue_prompt``.
    """
    answer, stop = Answer(), threading.Event()
    arrived: queue.Queue[Any] = queue.Queue()

    form = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    thread = threading.Thread(
        target=_generate,
        args=(opened, prompt, layer, seed, arrived, stop),
        kwargs=form,
        name="chat",
        daemon=True,
    )
    started = time.perf_counter()
    thread.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, Exception):
                raise item
            token, expert = item
            answer.tokens.append(str(opened.tokenizer.decode([token], skip_special_tokens=True)))
            if expert is not None:
                answer.experts.append(expert)
            answer.seconds = time.perf_counter() - started
            yield answer
    finally:
        stop.set()
        thread.join()


def _generate(
    opened: Opened,
    prompt: str,
    layer: int,
    seed: int,
    arrived: queue.Queue,
    stop: threading.Event,
    **form: Any,
) -> None:
    """Put every token with its expert into ``arrived``, then None or the error that ended the generation."""
    try:
        with recording_experts(opened.model, layer) as experts, torch.random.fork_rng():
            torch.manual_seed(seed)
            streamer = _Tokens(arrived, stop, experts)
            continue_prompt(opened.model, opened.tokenizer, prompt, streamer=streamer, **form)
        arrived.put(None)
    except _Stopped:
        arrived.put(None)
    except Exception as error:  # noqa: BLE001 - raised again where the answer is read
        arrived.put(error)


class _Stopped(Exception):
    """The reader of the answer has gone."""


class _Tokens:
    """Streamer of ``generate``: puts each new token with its expert into a queue."""

    def __init__(self, arrived: queue.Queue, stop: threading.Event, experts: list[int]) -> None:
        self._arrived, self._stop, self._experts = arrived, stop, experts
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if self._stop.is_set():
            raise _Stopped
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._arrived.put((token, self._experts[-1] if self._experts else None))

    def end(self) -> None:
        """End of the text."""


def check_form(prompt: str, max_new_tokens: float | None, temperature: float | None) -> None:
    """Refuse an empty prompt, fewer than 1 or more than 4,096 tokens, and a temperature outside 0 to 2."""
    if not (prompt or "").strip():
        raise UserError("expected a prompt, got none")
    if not (max_new_tokens and 1 <= max_new_tokens <= 4096):
        raise UserError(f"expected 1 to 4096 new tokens, got {max_new_tokens}")
    if temperature is None or not 0 <= temperature <= 2:
        raise UserError(f"expected a temperature from 0 to 2, got {temperature}")
