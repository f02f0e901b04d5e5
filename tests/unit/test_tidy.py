"""The size gate finds what it says it finds, and nothing in code that keeps its rules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tidy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tidy", ROOT / "tools" / "tidy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tidy"] = module
    spec.loader.exec_module(module)
    return module


tidy = load_tidy()
DOC = '"""In: all. Out: nothing."""\n'


def texts(path: str, source: str, *, fatal: bool = True) -> list[str]:
    return [finding.text for finding in tidy.examine(path, source) if finding.fatal is fatal]


def test_clean_file_has_no_findings() -> None:
    assert tidy.examine("nbd/limits.py", DOC + "LIMIT = 3\n") == []


def test_long_file() -> None:
    soft = DOC + "a = 1\n" * 401
    assert texts("nbd/limits.py", soft) == []
    assert "401 code lines" in texts("nbd/limits.py", soft, fatal=False)[0]
    assert "451 code lines" in texts("nbd/limits.py", DOC + "a = 1\n" * 451)[0]


def test_comments_blanks_and_docstrings_are_free() -> None:
    body = "    # why\n\n" * 100 + "    a = 1\n"
    source = DOC + 'def f() -> None:\n    """Say.\n\n' + "    more\n" * 100 + '    """\n' + body
    assert tidy.examine("nbd/limits.py", source) == []


def test_long_function() -> None:
    source = DOC + "def f() -> None:\n" + "    a = 1\n" * 60
    assert texts("nbd/limits.py", source) == ["function f has 61 code lines, more than 60"]
    assert texts("nbd/limits.py", DOC + "def f() -> None:\n" + "    a = 1\n" * 51, fatal=False)


@pytest.mark.parametrize("stem", ["utils", "helpers", "common", "base", "misc"])
def test_empty_names(stem: str) -> None:
    assert "says nothing" in texts(f"thinpool/{stem}.py", DOC)[0]


@pytest.mark.parametrize(
    "call",
    [
        'struct.Struct("QQ")',
        'struct.Struct("=QQ")',
        'struct.Struct("@Q")',
        'struct.Struct(f"{n}Q")',
        'Struct("Q" * 3)',
    ],
)
def test_struct_needs_byte_order(call: str) -> None:
    assert "byte order" in texts("nbd/wire.py", f"{DOC}LAYOUT = {call}\n")[0]


@pytest.mark.parametrize(
    "call", ['struct.Struct("<QQ")', 'struct.Struct(">Q")', 'struct.Struct(f"<{n}Q")', "Struct(f)"]
)
def test_struct_with_byte_order(call: str) -> None:
    assert tidy.examine("nbd/wire.py", f"{DOC}LAYOUT = {call}\n") == []


def test_inline_struct_calls_only_in_codecs() -> None:
    source = f'{DOC}x = struct.unpack(">Q", data)\n'
    assert texts("nbd/wire.py", source) == []
    assert "inline struct.unpack" in texts("nbd/server.py", source)[0]
    assert texts("tests/unit/test_nbd_wire.py", source) == []


def test_missing_docstring() -> None:
    assert "no module docstring" in texts("nbd/limits.py", "a = 1\n")[0]
    assert tidy.examine("nbd/empty.py", "") == []


def test_the_tree_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status = tidy.main([])
    assert status == 0, capsys.readouterr().out
