"""The table of faults in README.md: each row there must be, and each test that a row names there is."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROW = re.compile(r"^\| (\d+) \|(.*)\|$", re.MULTILINE)


ROWS = {int(number): cells for number, cells in ROW.findall((HERE / "README.md").read_text())}
NUM_FAULTS = 25


@pytest.fixture(scope="module")
def known_tests():
    """The names of all tests, without `test_`."""
    files = HERE.parent.rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)}


def test_the_table_has_each_fault_once_and_in_order():
    assert list(ROWS) == list(range(1, NUM_FAULTS + 1))


@pytest.mark.parametrize("number", ROWS)
def test_a_row_names_tests_that_there_are(number, known_tests):
    named = re.findall(r"`([^`]+)`", ROWS[number])
    assert named
    for name in named:
        if "/" in name or name.endswith(".py"):
            assert (HERE / name).exists() or (HERE.parent.parent / name).exists(), name
            continue
        pattern = ".*".join(map(re.escape, name.split("...")))
        assert any(re.fullmatch(pattern, known) for known in known_tests), name
