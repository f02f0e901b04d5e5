"""Sizes as people write them.

In: parsing of `10G`, `10GiB`, `10GB`, `64K`, `1.5T`, plain bytes. Out: printing (`wording.iec`) and what a size must
be a multiple of (`opening.py`, `pool.py`).

A bare letter is binary, as with lvm, qemu-img and zfs; `B` after it without the `i` is decimal, as SI says.
"""

from __future__ import annotations

import re

from .errors import BadSize

PREFIXES = "KMGTPE"
SIZE_BYTES_MAX = (1 << 63) - 1  # off_t
TEXT_LENGTH_MAX = 40
_SIZE = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?[ ]?([A-Za-z]*)")
EXAMPLES = "write it like 10G (GiB), 10GiB, 10GB (10^9) or in bytes"


def parse_size(text: str) -> int:
    """Return the size in bytes, at least 1. Raises BadSize for everything that is not a whole positive number."""
    stripped = text.strip()
    match = _SIZE.fullmatch(stripped) if len(stripped) <= TEXT_LENGTH_MAX else None
    if match is None:
        raise BadSize(text, f"not a size; {EXAMPLES}")
    sign, whole, fraction, unit = match.groups()
    factor = _factor(unit)
    if factor is None:
        raise BadSize(text, f"no unit is called {unit!r}; {EXAMPLES}")
    digits = fraction or ""
    scaled, rest = divmod(int(whole + digits) * factor, int(10 ** len(digits)))
    if sign == "+":
        raise BadSize(text, "a size is absolute, it is not added to the present one")
    if sign == "-" and (scaled or rest):
        raise BadSize(text, "a size is not negative")
    if rest:
        raise BadSize(text, "that is no whole number of bytes")
    if scaled == 0:
        raise BadSize(text, "a size is at least one byte")
    if scaled > SIZE_BYTES_MAX:
        raise BadSize(text, "sizes end below 8 EiB")
    return scaled


def _factor(unit: str) -> int | None:
    """Bytes a unit stands for: K, Ki, KiB binary; KB decimal; B and nothing are bytes. Case does not matter."""
    lowered = unit.lower()
    if lowered in ("", "b"):
        return 1
    exponent = PREFIXES.lower().find(lowered[0]) + 1
    if not exponent:
        return None
    if lowered[1:] in ("", "i", "ib"):
        return 1 << 10 * exponent
    return int(10 ** (3 * exponent)) if lowered[1:] == "b" else None
