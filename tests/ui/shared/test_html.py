from __future__ import annotations

from ui.shared.html import note, progress_bar, table


def test_tables_escape_text_and_align_numbers():
    found = table(("a<b", "n"), [["<i>", 3], ["x", 1 / 3]])
    assert "<th scope='col'>a&lt;b</th>" in found and "<td>&lt;i&gt;</td>" in found
    assert "<td class=fg-number>3</td>" in found and "<td class=fg-number>0.3333</td>" in found


def test_notes_and_progress_escape_text():
    assert note("<x>") == "<p class='fg-note' role='status'>&lt;x&gt;</p>" and "fg-error" in note(
        "x", error=True
    )
    assert "value='0.2500'" in progress_bar("a", 0.25) and "value" not in progress_bar("&", None)
    assert "&amp;" in progress_bar("&", None)
