"""The page in a real browser: errors on its console, requests to other machines, keyboard, widths and color schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

DRAWN = "document.querySelector('#experts-map [data-marks]')?.dataset.marks"


@pytest.fixture
def tab(page, browser) -> Iterator[Page]:
    """A browser tab with the page; at the end no console error and no request to another machine was seen."""
    found: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: found.extend([message.text] if message.type == "error" else []))
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on(
        "request", lambda request: found.extend([] if is_local(request.url, page.address) else [request.url])
    )
    tab.goto(page.address)
    tab.wait_for_selector("input[type=file]", state="attached")
    yield tab
    tab.close()
    assert found == []


def is_local(url: str, address: str) -> bool:
    """Whether a request stays on this machine."""
    return url.startswith((address, "data:", "blob:"))


def load(tab: Page, page, number: str = "1") -> None:
    """Load the saliency file ranked by hand and remove ``number`` experts a layer."""
    tab.set_input_files("input[type=file]", str(page.saliency))
    tab.wait_for_function(f"{DRAWN} === 'kkkkkkkk'")
    tab.get_by_label("Experts to remove").fill(number)
    tab.get_by_label("Experts to remove").press("Tab")


def test_requests_to_other_machines_are_recognized():
    assert is_local("http://127.0.0.1:7/x", "http://127.0.0.1:7/") and is_local(
        "data:x", "http://127.0.0.1:7/"
    )
    assert not is_local("https://example.org/font.woff2", "http://127.0.0.1:7/")


def test_a_selection_is_drawn_and_downloads_as_json(tab, page):
    load(tab, page)
    tab.wait_for_function(f"{DRAWN} === 'kkkppkkk'")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download JSON").click()
    assert json.loads(download.value.path().read_text())["keep_map"] == {"0": [0, 1, 2], "1": [1, 2, 3]}


def test_arrow_keys_read_the_experts_of_the_heat_map(tab, page):
    load(tab, page)
    tab.wait_for_function(f"{DRAWN} === 'kkkppkkk'")
    tab.locator("#experts-map canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    told = tab.locator("#experts-map output").inner_text()
    assert told.startswith("layer 0, expert 3 · rank 4 ·") and told.endswith("pruned")


def test_an_impossible_number_is_an_error_on_the_page_and_removes_the_selection(tab, page):
    load(tab, page, "4")
    tab.get_by_text("expected to remove at most 3 experts in layer 0").first.wait_for()
    tab.get_by_text("No selection.").wait_for()


def test_a_job_runs_to_its_end(tab, page):
    load(tab, page)
    tab.wait_for_function(f"{DRAWN} === 'kkkppkkk'")
    tab.get_by_label("Name of the output").fill("from-browser")
    tab.get_by_role("button", name="Run prune or merge").click()
    tab.get_by_text("Wrote").wait_for(timeout=60_000)
    assert (page.runs / "from-browser" / "config.json").is_file()


def test_every_tab_opens_and_has_its_form(tab):
    for name, field in (
        ("Run", "Layer"),
        ("Diff", "First run"),
        ("Chat", "Prompt"),
        ("Experts", "Experts to remove"),
    ):
        tab.get_by_role("tab", name=name).click()
        tab.get_by_label(field, exact=True).first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_no_part_of_the_page_is_wider_than_the_screen(tab, page, tmp_path, width, scheme):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    load(tab, page)
    tab.wait_for_function(f"{DRAWN} === 'kkkppkkk'")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(", "))) < 200) == (scheme == "dark")
    assert len(tab.screenshot(path=tmp_path / "page.png", full_page=True)) > 10_000
