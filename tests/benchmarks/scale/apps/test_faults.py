from __future__ import annotations

import pytest

from benchmarks.scale.apps.faults import DROPPED, LATE, faulty, faulty_count, read_fault, write_faults


@pytest.mark.parametrize(("asked", "count"), [(1, 0), (2, 0), (3, 1), (4, 1), (8, 1), (9, 2), (25, 4)])
def test_an_eighth_is_late_and_at_least_one_client_answers(asked, count):
    assert faulty_count(asked) == count


def test_the_last_nodes_are_late_and_those_before_them_fail():
    assert faulty([7, 5, 3]) == {5: DROPPED, 3: LATE}
    assert faulty(range(9)) == {5: DROPPED, 6: DROPPED, 7: LATE, 8: LATE}
    assert faulty([1, 2]) == {}


def test_faults_are_those_of_one_round(tmp_path):
    assert read_fault(tmp_path, 2, 5) == ""
    write_faults(tmp_path, 2, {5: LATE, 2**63: DROPPED})
    assert [read_fault(tmp_path, 2, node) for node in (5, 2**63, 6)] == [LATE, DROPPED, ""]
    assert read_fault(tmp_path, 3, 5) == ""
