from __future__ import annotations

from ui.chat.colored_text import answer_html, hue
from ui.chat.generation import Answer


def test_tokens_have_the_color_of_their_expert_and_a_legend_by_number():
    html = answer_html("<m>", Answer(["a", "<b>", "c"], [2, 1, 2], 1.5))
    assert "&lt;m&gt;" in html and "3 tokens, 2.0 tokens/s" in html
    assert f"<span style='--hue:{hue(1)}' class='fg-token' title='expert 1'>&lt;b&gt;</span>" in html
    assert html.index("2: 2") < html.index("1: 1")


def test_a_model_without_experts_has_plain_tokens():
    html = answer_html("dense", Answer(["a"], [], 1.0))
    assert "<span>a</span>" in html and "fg-token" not in html and "experts" not in html


def test_experts_have_hues_far_apart():
    assert hue(0) == 0 and hue(1) == 137 and len({hue(expert) for expert in range(128)}) > 100
