from __future__ import annotations

import pytest

from configs.errors import UserError
from ui.shared.local_data import local_data


def test_data_needs_no_network(tmp_path):
    assert local_data(" wikimix:law ") == "wikimix:law" and local_data(str(tmp_path)) == str(tmp_path)
    for source in ("", "owner/dataset", str(tmp_path / "absent.txt")):
        with pytest.raises(UserError, match="`data` to be wikimix or a file or folder"):
            local_data(source)
