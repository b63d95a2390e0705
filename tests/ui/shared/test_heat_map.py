from __future__ import annotations

import base64
import json

import gradio as gr
import numpy as np
import pytest

from ui.shared.assets import asset
from ui.shared.heat_map import MARKS, heat_map, heat_map_value

VALUES = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, np.nan]])


def shades(value: str) -> list[int]:
    return list(base64.b64decode(json.loads(value)["shade"]))


def test_values_are_shades_from_the_lowest_to_the_highest_and_absent_experts_have_no_mark():
    marks = np.array([["k", "p", "x"], ["k", "k", "k"]])
    value = heat_map_value(VALUES, rows=["3", "5"], fields={"rank": VALUES}, marks=marks)
    assert shades(value)[:5] == [0, 128, 255, 128, 0]
    content = json.loads(value)
    assert content["marks"] == "kpxkk " and content["rows"] == ["3", "5"] and content["columns"] == 3
    assert content["fields"] == {"rank": [1.0, 2.0, 3.0, 2.0, 1.0, None]} and content["names"] == MARKS


def test_zero_is_the_middle_of_a_diverging_scale():
    value = heat_map_value(np.array([[-4.0, 0.0, 2.0]]), rows=["0"], fields={}, diverging=True)
    assert shades(value) == [1, 128, 192] and json.loads(value)["diverging"] is True


@pytest.mark.parametrize(("diverging", "shade"), [(False, 0), (True, 128)])
def test_equal_values_have_one_shade(diverging, shade):
    assert shades(heat_map_value(np.zeros((1, 2)), rows=["0"], fields={}, diverging=diverging)) == [
        shade,
        shade,
    ]


def test_figures_are_rounded_to_five_digits():
    content = json.loads(
        heat_map_value(np.array([[1 / 3]]), rows=["0"], fields={"score": np.array([[123456.7]])})
    )
    assert content["fields"]["score"] == [123460.0]


def test_the_component_names_what_it_shows():
    with gr.Blocks():
        component = heat_map("Rank of every expert", "map")
    assert (
        'aria-label="Rank of every expert"' in component.html_template
        and "LABEL" not in component.html_template
    )
    assert "keydown" in asset("heat_map.js")
