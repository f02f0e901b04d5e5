"""The grammar of LVM's text files (lvmconfig(8), and lib/config/config.c of LVM2): sections, values, lists.

In: text to nested dictionaries. Out: what the keys mean (`lvm_names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

DEPTH_MAX = 16
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<number>[-+]?\d+(?:\.\d+)?(?![\w.+/-]))
    |(?P<word>[\w.+/-]+)
    |(?P<sign>[={}\[\],])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class BadConfig(Exception):  # noqa: N818 -- says what happened, as the leaves in errors.py do
    """Text that is not LVM's: on which line, and what is wrong."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class _Tokens:
    """The tokens of a text, one of them looked ahead at."""

    def __init__(self, text: str) -> None:
        self.line = 1
        self._stream = self._scan(text)
        self.kind, self.value = next(self._stream)

    def _scan(self, text: str) -> Iterator[tuple[str, Any]]:
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise BadConfig(self.line, f"{text[position]!r} is not expected")
            kind, found = str(match.lastgroup), match.group()
            position = match.end()
            if kind == "string":
                yield kind, _ESCAPE.sub(r"\1", found[1:-1])
            elif kind == "number":
                yield kind, float(found) if "." in found else int(found)
            elif kind != "skip":
                yield kind, found
            self.line += found.count("\n")
        yield "end", None

    def take(self) -> Any:
        """The value of the token looked at; goes on to the next."""
        value = self.value
        self.kind, self.value = next(self._stream)
        return value

    def take_sign(self, sign: str) -> None:
        """Go past a sign that must come now."""
        if (self.kind, self.value) != ("sign", sign):
            raise BadConfig(self.line, f"{sign!r} is expected, not {self.value!r}")
        self.take()

    def sees(self, sign: str) -> bool:
        return (self.kind, self.value) == ("sign", sign)


def parse_config(text: str) -> dict[str, Any]:
    """Sections become dictionaries, lists lists, strings text, numbers numbers. Raises BadConfig."""
    tokens = _Tokens(text)
    found = _section(tokens, 0)
    if tokens.kind != "end":
        raise BadConfig(tokens.line, f"{tokens.value!r} is not expected")
    return found


def _section(tokens: _Tokens, depth: int) -> dict[str, Any]:
    if depth > DEPTH_MAX:
        raise BadConfig(tokens.line, "sections are nested too deep")
    found: dict[str, Any] = {}
    # A volume may be called "1" or "10", so a number can be a name too.
    while tokens.kind in ("word", "string", "number"):
        key = str(tokens.take())
        if tokens.sees("{"):
            tokens.take()
            found[key] = _section(tokens, depth + 1)
            tokens.take_sign("}")
        else:
            tokens.take_sign("=")
            found[key] = _value(tokens)
    return found


def _value(tokens: _Tokens) -> Any:
    if not tokens.sees("["):
        return _scalar(tokens)
    tokens.take()
    values: list[Any] = []
    while not tokens.sees("]"):
        values.append(_scalar(tokens))
        if not tokens.sees("]"):
            tokens.take_sign(",")
    tokens.take()
    return values


def _scalar(tokens: _Tokens) -> Any:
    if tokens.kind not in ("string", "number", "word"):
        raise BadConfig(tokens.line, f"a value is expected, not {tokens.value!r}")
    return tokens.take()
