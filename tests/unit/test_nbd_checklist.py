"""The table in docs/nbd.md: every row names tests, every test exists and is not switched off."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([A-Z]\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)
SECTIONS = {"H": 18, "S": 7, "O": 31, "M": 17, "T": 15, "B": 3, "F": 20, "R": 15, "C": 34, "L": 16, "P": 11}


def rows() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, cell in ROW.findall((ROOT / "docs" / "nbd.md").read_text()):
        assert number not in found, f"row {number} twice"
        found[number] = re.findall(r"`(test_[a-z0-9_]+)`", cell)
    return found


@functools.cache
def existing() -> dict[str, ast.FunctionDef]:
    tests: dict[str, ast.FunctionDef] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests[node.name] = node
    return tests


def test_no_row_is_missing() -> None:
    numbers = [f"{section}{index + 1}" for section, count in SECTIONS.items() for index in range(count)]
    assert list(rows()) == numbers


@pytest.mark.parametrize(("row", "tests"), rows().items())
def test_every_row_has_tests_that_run(row: str, tests: list[str]) -> None:
    assert tests, f"row {row} names no test"
    found = existing()
    for name in tests:
        assert name in found, f"row {row} names {name}, which does not exist"
        decorators = [ast.unparse(decorator) for decorator in found[name].decorator_list]
        assert not any("mark.skip(" in text or "xfail" in text for text in decorators)
