"""What may name a device.

A name is 1 to 255 bytes of UTF-8, so that it fits a file name, an NBD export name (4096 bytes) and a DNS label's
bigger brothers. `@`, `.`, `-`, blanks and every printable character are fine. Refused: `/` (names become path parts of
URIs and files), control characters and line separators (they break listings), `.` and `..`, a leading `-` (it would
read as an option), and bytes that are no UTF-8.
"""

from __future__ import annotations

import unicodedata

from .errors import BadName

NAME_BYTES_MAX = 255


def check_name(name: str) -> None:
    """Raise BadName unless `name` may name a device."""
    reason = _objection(name)
    if reason is not None:
        raise BadName(name, reason)


def _objection(name: str) -> str | None:
    if not name:
        return "a name has at least one character"
    try:
        length_bytes = len(name.encode())
    except UnicodeEncodeError:
        return "a name is text in UTF-8"
    if length_bytes > NAME_BYTES_MAX:
        return f"a name has at most {NAME_BYTES_MAX} bytes"
    if "/" in name:
        return "a name holds no slash"
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        return "a name holds no control characters"
    if name in (".", ".."):
        return "this has a meaning of its own in paths"
    if name.startswith("-"):
        return "a name does not begin with a hyphen"
    return None
