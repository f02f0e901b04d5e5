# ruff: noqa: EM101, EM102, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""Reading the XML of thin_dump, as a stream: both dialects, with and without shared parts.

In: superblock, devices and runs of mappings as events. Out: what is built of them (restore).

thin_dump 0.9 writes every device out in full; 1.x writes what devices share once, as ``<def name="...">``, and refers
to it by ``<ref name="..."/>``. Both are taken; what was defined is remembered and given out at each reference. Nearly
all of a dump are lines of mappings in one exact form, and those do not go through the XML parser (mapping_lines).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from xml.parsers import expat

import numpy as np

from .errors import XmlInvalid
from .layout import DATA_BLOCK_LIMIT, DEVICE_ID_LIMIT, KEY_LIMIT, TIME_BITS, TIME_LIMIT
from .mapping_lines import MappingLines, split_mapping_lines
from .runs import Runs

_CHUNK_BYTES = 2 << 20
# Mappings that came through the XML parser are handed on in this many at most.
_BATCH_RUNS = 1 << 16
_UUID_BYTES = 16


class ByteStream(Protocol):
    """Anything with `read`: a file opened in binary mode, a pipe."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end."""
        ...


@dataclass(frozen=True, slots=True)
class PoolHeader:
    """The attributes of <superblock>."""

    uuid: bytes
    time: int
    transaction_id: int
    flags: int
    data_block_sectors: int
    data_blocks: int


@dataclass(frozen=True, slots=True)
class DeviceHeader:
    """The attributes of <device>; the number of mapped blocks it gives is not trusted and left out."""

    device_id: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


class Receiver(Protocol):
    """Takes what was read, in the order of the document."""

    def begin_pool(self, header: PoolHeader) -> None:
        """Once, first."""
        ...

    def begin_device(self, header: DeviceHeader) -> None:
        """Runs that follow belong to this device."""
        ...

    def runs(self, runs: Runs) -> None:
        """Some runs of the device, in the order given, which need not be ascending."""
        ...

    def end_device(self) -> None:
        """The device is complete."""
        ...


def read_xml(stream: ByteStream, receiver: Receiver) -> None:
    """Read a whole document.

    Raises:
        XmlInvalid: no XML, not this XML, or numbers outside what the format can express.
        Whatever the stream and the receiver raise.
    """
    reader = _Reader(receiver)
    rest = b""
    while chunk := stream.read(_CHUNK_BYTES):
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        reader.feed(whole + newline)
    reader.feed(rest)
    reader.close()


class _Reader:
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._path: list[str] = []
        self._definitions: dict[str, list[Runs]] = {}
        self._definition: list[Runs] | None = None
        self._batch: list[tuple[int, int, int, int]] = []
        self._plain = True
        self._lines_apart = 0

    # Text

    def feed(self, text: bytes) -> None:
        """Take text that ends with a line."""
        # A comment or the like could hide lines that look like mappings: from there on all goes to the parser.
        if b"!" in text or b"?" in text:
            hidden = text.count(b"<!") + text.count(b"<?") - text.startswith(b"<?xml ")
            self._plain = self._plain and not hidden
        if not self._plain:
            self._parse(text)
            return
        for part in split_mapping_lines(text):
            if isinstance(part, MappingLines):
                self._flush()
                self._lines_apart += part.lines
                self._check_place("mapping")
                self._hand_on(self._checked(part.begins, part.data_begins, part.lengths, part.times))
            else:
                self._parse(part)

    def close(self) -> None:
        """The document has ended."""
        self._parse(b"", last=True)

    def _parse(self, text: bytes, *, last: bool = False) -> None:
        try:
            self._parser.Parse(text, last)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            raise XmlInvalid(
                error.lineno + self._lines_apart, f"it is no well-formed XML: {reason}"
            ) from error

    def _invalid(self, problem: str) -> XmlInvalid:
        return XmlInvalid(self._parser.CurrentLineNumber + self._lines_apart, problem)

    def _doctype(self, *_: object) -> None:
        raise self._invalid("a document type is declared, which no dump does")

    # Elements

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._check_place(name)
        self._path.append(name)
        if name in ("single_mapping", "range_mapping"):
            self._mapping(name, attributes)
        else:
            self._flush()
            getattr(self, f"_start_{name}")(attributes)

    def _check_place(self, name: str) -> None:
        kind = "mapping" if name in ("single_mapping", "range_mapping") else name
        if kind not in _PLACES:
            raise self._invalid(f"<{name}> is unknown")
        parent = self._path[-1] if self._path else None
        if parent not in _PLACES[kind]:
            raise self._invalid(f"<{name}> has no place inside {f'<{parent}>' if parent else 'nothing'}")

    def _end(self, name: str) -> None:
        self._path.pop()
        if name in ("device", "def"):
            self._flush()
            if name == "device":
                self._receiver.end_device()
            self._definition = None

    def _start_superblock(self, attributes: dict[str, str]) -> None:
        uuid = attributes.get("uuid", "").encode()
        if len(uuid) > _UUID_BYTES:
            raise self._invalid(f"the uuid has {len(uuid)} bytes, more than {_UUID_BYTES}")
        header = PoolHeader(
            uuid.ljust(_UUID_BYTES, b"\0"),
            self._number(attributes, "time", TIME_LIMIT),
            self._number(attributes, "transaction", 2**64),
            self._number(attributes, "flags", 2**32) if "flags" in attributes else 0,
            self._number(attributes, "data_block_size", 2**32),
            self._number(attributes, "nr_data_blocks", DATA_BLOCK_LIMIT + 1),
        )
        self._receiver.begin_pool(header)

    def _start_device(self, attributes: dict[str, str]) -> None:
        self._receiver.begin_device(
            DeviceHeader(
                self._number(attributes, "dev_id", DEVICE_ID_LIMIT),
                self._number(attributes, "transaction", 2**64),
                self._number(attributes, "creation_time", 2**32),
                self._number(attributes, "snap_time", 2**32),
            )
        )

    def _start_def(self, attributes: dict[str, str]) -> None:
        name = self._text(attributes, "name")
        if name in self._definitions:
            raise self._invalid(f"the part {name!r} is defined twice")
        self._definition = self._definitions[name] = []

    def _start_ref(self, attributes: dict[str, str]) -> None:
        name = self._text(attributes, "name")
        if name not in self._definitions:
            raise self._invalid(f"the part {name!r} is not defined before it is referred to")
        for runs in self._definitions[name]:
            self._hand_on(runs)

    # Mappings

    def _mapping(self, name: str, attributes: dict[str, str]) -> None:
        time = self._number(attributes, "time", TIME_LIMIT)
        if name == "single_mapping":
            begin = self._number(attributes, "origin_block", KEY_LIMIT)
            data, length = self._number(attributes, "data_block", DATA_BLOCK_LIMIT), 1
        else:
            begin = self._number(attributes, "origin_begin", KEY_LIMIT)
            data = self._number(attributes, "data_begin", DATA_BLOCK_LIMIT)
            length = self._number(attributes, "length", DATA_BLOCK_LIMIT + 1)
        self._batch.append((begin, data, length, time))
        if len(self._batch) >= _BATCH_RUNS:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            columns = [np.array(column, np.uint64) for column in zip(*self._batch, strict=True)]
            self._batch.clear()
            self._hand_on(self._checked(*columns))

    def _checked(self, begins: np.ndarray, data: np.ndarray, lengths: np.ndarray, times: np.ndarray) -> Runs:
        limit = np.uint64(DATA_BLOCK_LIMIT)
        if (lengths == 0).any():
            raise self._invalid("a mapping has length 0")
        if (data >= limit).any() or (lengths > limit - data).any():
            raise self._invalid(f"a data block is not below {DATA_BLOCK_LIMIT}")
        if (times >= TIME_LIMIT).any():
            raise self._invalid(f"a time is not below {TIME_LIMIT}")
        if (begins > np.uint64(KEY_LIMIT - 1) - (lengths - np.uint64(1))).any():
            raise self._invalid(f"a thin block is not below {KEY_LIMIT}")
        return Runs(begins, data << np.uint64(TIME_BITS) | times, lengths)

    def _hand_on(self, runs: Runs) -> None:
        if self._definition is not None:
            self._definition.append(runs)
        else:
            self._receiver.runs(runs)

    # Attributes

    def _text(self, attributes: dict[str, str], name: str) -> str:
        if name not in attributes:
            raise self._invalid(f"<{self._path[-1]}> lacks the attribute {name}")
        return attributes[name]

    def _number(self, attributes: dict[str, str], name: str, limit: int) -> int:
        text = self._text(attributes, name)
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < limit):
            raise self._invalid(f"{name}={text!r} is no number below {limit}")
        return int(text)


# Which elements may stand in which.
_PLACES: dict[str, tuple[str | None, ...]] = {
    "superblock": (None,),
    "device": ("superblock",),
    "def": ("superblock",),
    "ref": ("device", "def"),
    "mapping": ("device", "def"),
}
