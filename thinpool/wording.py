"""How names, paths and sizes appear in sentences for people.

In: escaping of anything a terminal or a log line would not survive, shortening of absurdly long names, IEC sizes,
times. Out: the sentences themselves (`errors.py`, `cli/`) and the parsing of sizes (`units.py`).

Names come from command lines and from the network, so they may hold control characters, newlines or bytes that
are no UTF-8 (which Python carries as surrogates U+DC80..U+DCFF). Nothing here raises, whatever it is given.
"""

from __future__ import annotations

SHOWN_CHARACTERS_MAX = 80
PATH_CHARACTERS_MAX = 1024
IEC_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def escaped(text: str) -> str:
    """Return `text` with control characters, unpaired surrogates and backslashes written as escapes."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character.isprintable():
        return character
    return repr(character)[1:-1]


def quoted(name: str) -> str:
    """Return a device name in quotes, fit for one line; long ones are cut and say how long they are."""
    if len(name) > SHOWN_CHARACTERS_MAX:
        length_bytes = len(name.encode("utf-8", "surrogatepass"))
        return f"'{_escape_quoted(name[:SHOWN_CHARACTERS_MAX])}...' ({length_bytes} bytes)"
    return f"'{_escape_quoted(name)}'"


def _escape_quoted(name: str) -> str:
    return escaped(name).replace("'", "\\'")


def shown_path(path: object) -> str:
    """Return a path for a sentence: as it is where it is plain, in quotes where it holds blanks or escapes."""
    text = str(path)
    if len(text) > PATH_CHARACTERS_MAX:
        text = text[:PATH_CHARACTERS_MAX] + "..."
    plain = escaped(text)
    if not text or plain != text or any(character.isspace() for character in text):
        return f"'{_escape_quoted(text)}'"
    return plain


def iec(size_bytes: int) -> str:
    """Return a byte count in IEC units, exact where that is short: 10 GiB, 1.5 MiB, 123 B, 2.34 GiB."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    exponent = min(max(size.bit_length() - 1, 0) // 10, len(IEC_UNITS) - 1)
    value = size / (1 << (10 * exponent))
    if exponent and round(value, 2) >= 1024 and exponent + 1 < len(IEC_UNITS):
        exponent += 1
        value = size / (1 << (10 * exponent))
    number = f"{value:.2f}".rstrip("0").rstrip(".") if exponent else str(size)
    return f"{sign}{number} {IEC_UNITS[exponent]}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 3 h 20 min, 45 s, 12 d 4 h; years without anything behind."""
    whole = max(round(seconds), 0)
    if whole >= 365 * 86400:
        return f"{whole // (365 * 86400)} years"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for index, (name, size) in enumerate(units):
        if whole >= size:
            rest = whole % size
            if index + 1 < len(units) and rest >= units[index + 1][1]:
                return f"{whole // size} {name} {rest // units[index + 1][1]} {units[index + 1][0]}"
            return f"{whole // size} {name}"
    return "0 s"
