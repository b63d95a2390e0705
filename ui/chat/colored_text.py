"""Text of an answer as HTML, each token in the color of its expert."""

from __future__ import annotations

from html import escape

from ui.chat.generation import Answer

_TURN = 137.508  # degrees between the hues of neighbors: the golden angle, so that few experts differ most


def answer_html(name: str, answer: Answer) -> str:
    """The name of the model, the rate, the text, and a legend of the experts by falling number of tokens."""
    colored = len(answer.experts) == len(answer.tokens) and bool(answer.experts)
    experts = answer.experts if colored else [-1] * len(answer.tokens)
    text = "".join(_token(token, expert) for token, expert in zip(answer.tokens, experts, strict=True))
    rate = f"{len(answer.tokens)} tokens, {answer.rate:.1f} tokens/s"
    legend = _legend(answer.experts) if colored else ""
    return (
        f"<div class='fg-answer'><h3>{escape(name)}</h3><p class='fg-rate'>{rate}</p>"
        f"<div class='fg-text'>{text}</div>{legend}</div>"
    )


def hue(expert: int) -> int:
    """Hue of an expert in degrees, 0 to 359."""
    return int(expert * _TURN) % 360


def _token(token: str, expert: int) -> str:
    if expert < 0:
        return f"<span>{escape(token)}</span>"
    return (
        f"<span style='--hue:{hue(expert)}' class='fg-token' title='expert {expert}'>{escape(token)}</span>"
    )


def _legend(experts: list[int]) -> str:
    counts = {expert: experts.count(expert) for expert in experts if expert >= 0}
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = "".join(
        f"<span class='fg-token' style='--hue:{hue(expert)}'>{expert}: {count}</span> "
        for expert, count in items
    )
    return f"<p class='fg-legend'>experts: {shown}</p>"
