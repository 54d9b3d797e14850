"""docs/reference/faults.md names, for each scenario, a test that plays it, and exit codes that there are."""

import re
from pathlib import Path

import pytest

from simpo_megatron import errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/faults.md"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "`tests/" in line]
# Done, unexpected, and 128 more than the signal that ends a process.
CODES = {"0", "1", "130", "143"} | {
    str(kind.exit_code) for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")
}


def named_tests(cell: str) -> list[tuple[str, str]]:
    """Returns (file, function or case) of each test that the last cell of a row names."""
    found = []
    for part in cell.split("; "):
        file, names = re.fullmatch(r"`(tests/\S+\.py)` (.+)", part).groups()
        found += [(file, name) for name in names.split(", ")]
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_each_scenario_is_played_by_a_test(row):
    assert len(row) == 4
    assert set(re.findall(r"\d+", row[2])) <= CODES
    for file, name in named_tests(row[3]):
        assert re.search(rf'def {name}\(|^ +"{name}": ', (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"


def test_every_file_of_fault_tests_is_on_the_page():
    assert len(ROWS) > 30
    on_page = {file for row in ROWS for file, _ in named_tests(row[3])}
    missing = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/faults").glob("test_*.py")} - on_page
    assert not missing
