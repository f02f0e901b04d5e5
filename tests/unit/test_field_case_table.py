"""The table of field cases in docs/crash-safety.md: every case is there, and the tests it names exist and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.test_nbd_checklist import existing

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "crash-safety.md"
ROW = re.compile(r"^\| (B\d+) \| ([^|]*) \| ?([^|]*?) ?\| ([^|]*) \|$", re.MULTILINE)
# Classes A to E, G and K: odd numbers.
CASES = [
    f"B{number:02}" for first, last in ((1, 53), (67, 75), (125, 133)) for number in range(first, last + 1, 2)
]


def rows() -> dict[str, tuple[str, str]]:
    """(tests, outcome) by case."""
    found: dict[str, tuple[str, str]] = {}
    for case, _, tests, outcome in ROW.findall(DOCUMENT.read_text()):
        assert case not in found, f"{case} twice"
        found[case] = tests, outcome
    return found


def test_no_case_is_missing() -> None:
    assert list(rows()) == CASES


@pytest.mark.parametrize(("case", "row"), rows().items())
def test_every_case_has_tests_or_says_that_it_has_none(case: str, row: tuple[str, str]) -> None:
    tests, outcome = row
    named = re.findall(r"`(test_[a-z0-9_]+)`", tests)
    assert bool(named) != outcome.startswith("not covered"), f"{case} has no test and does not say so"
    for name in named:
        assert name in existing(), f"{case} names {name}, which does not exist"


def test_every_test_that_the_page_names_exists() -> None:
    for name in re.findall(r"`(test_[a-z0-9_]+)`", DOCUMENT.read_text()):
        assert name in existing(), name
