"""Bytes give replies or a protocol error, never another exception, never unbounded memory.

Three kinds of search: plain bytes, well-formed messages with a few bytes changed, and well-formed requests against an oracle
of bytes. The corpus in `tests/corpus/nbd` (kept by this file's failures and by `tools/fuzz_nbd.py`) is run first, every time.
"""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd.constants import Command, CommandFlag, Errno, Option
from nbd.options import encode_context_query, encode_export_query
from nbd.validation import check
from nbd.wire import error_payload, extended_chunk, simple_reply, structured_chunk
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_streams import Request, converse, option, terms_for
from tests.fakes.nbd_targets import CONTEXTS, LIMITS, SIZE_BYTES, TARGETS

CORPUS = Path(__file__).resolve().parent.parent / "corpus" / "nbd"

numbers_32 = st.one_of(
    st.integers(0, 70_000), st.sampled_from([SIZE_BYTES, SIZE_BYTES - 1, 0xFFFFFFFF, 0x80000000, 1 << 20])
)
numbers_64 = st.one_of(numbers_32, st.sampled_from([1 << 63, (1 << 64) - 1, (1 << 64) - 512, 1 << 32]))
names = st.one_of(
    st.sampled_from([b"", b"disk", b"secret", "ü/b".encode(), b"nobody"]), st.binary(max_size=40)
)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """An option: right in every way, or with a lie in its lengths."""
    number = draw(st.one_of(st.sampled_from(Option), st.integers(0, 0xFFFFFFFF)))
    name = draw(names)
    match number:
        case Option.INFO | Option.GO:
            count = draw(st.integers(0, 5))
            data = struct.pack(">I", len(name)) + name + struct.pack(">H", count)
            data += b"".join(struct.pack(">H", draw(st.integers(0, 5))) for _ in range(count))
        case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
            queries = draw(
                st.lists(st.one_of(st.sampled_from([c.encode() for c in CONTEXTS]), names), max_size=4)
            )
            data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            data += b"".join(struct.pack(">I", len(query)) + query for query in queries)
        case Option.EXPORT_NAME:
            data = name
        case _:
            data = draw(st.binary(max_size=20))
    if draw(st.integers(0, 4)) == 0:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=6))
    length = len(data) if draw(st.integers(0, 9)) else draw(numbers_32)
    return option(number, data, length=length)


@st.composite
def requests(draw: st.DrawFn, *, extended: bool) -> bytes:
    """A request with any fields; its payload mostly as announced."""
    command = draw(st.one_of(st.sampled_from(Command), st.integers(0, 0xFFFF)))
    flags = draw(
        st.one_of(st.just(0), st.sampled_from([int(flag) for flag in CommandFlag]), st.integers(0, 0xFFFF))
    )
    length = draw(numbers_64 if extended else numbers_32)
    if extended and command == Command.WRITE and draw(st.booleans()):
        flags |= CommandFlag.PAYLOAD_LEN
    carries = flags & CommandFlag.PAYLOAD_LEN if extended else command == Command.WRITE
    payload = b"\x5a" * (length if carries and length <= 300_000 else draw(st.integers(0, 3)) // 3)
    request = Request(
        command, draw(numbers_64), length, flags, payload, cookie=draw(st.integers(0, (1 << 64) - 1))
    )
    return request.encode(extended=extended)


def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Mostly as it is; sometimes with a byte replaced, cut off, or something behind it."""
    kind = draw(st.integers(0, 5))
    if kind == 0 and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == 1:
        return data[: draw(st.integers(0, len(data)))]
    return data


@st.composite
def handshakes(draw: st.DrawFn) -> bytes:
    flags = struct.pack(">I", draw(st.sampled_from([3, 3, 3, 1, 0, 4])))
    stream = flags + b"".join(draw(st.lists(options(), max_size=8)))
    return bytes([draw(st.integers(0, 8))]) + changed(draw, stream)


@st.composite
def transmissions(draw: st.DrawFn) -> bytes:
    style = draw(st.integers(0, 255))
    stream = b"".join(draw(st.lists(requests(extended=style % 3 == 2), max_size=8)))
    return bytes([style, draw(st.integers(0, 3))]) + changed(draw, stream)


@st.composite
def reply_streams(draw: st.DrawFn) -> bytes:
    style = draw(st.integers(0, 2))
    out = b""
    for _ in range(draw(st.integers(0, 6))):
        cookie = draw(st.integers(0, 8))
        kind = draw(st.sampled_from([0, 1, 2, 5, 6, 0x8001, 0x8002, 3]))
        payload = draw(
            st.one_of(
                st.binary(max_size=40),
                st.just(struct.pack(">Q", 512 * cookie) + b"d" * 512),
                st.just(struct.pack(">QI", 512 * cookie, 512)),
                st.just(error_payload(Errno.EIO, "text")),
                st.just(struct.pack(">IIQQ", 1, 1, 512, 0)),
            )
        )
        done = draw(st.booleans())
        if style == 0:
            out += simple_reply(cookie) + b"d" * draw(st.sampled_from([0, 512]))
        elif style == 1:
            out += structured_chunk(cookie, kind, len(payload), done=done) + payload
        else:
            out += extended_chunk(cookie, 512 * cookie, kind, len(payload), done=done) + payload
    return bytes([style]) + changed(draw, out)


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    found = sorted((CORPUS / target).glob("*"))
    assert found, "the corpus is missing"
    for path in found:
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=400))
def test_any_bytes(target: str, data: bytes) -> None:
    TARGETS[target](data)


@given(data=handshakes())
def test_handshakes_that_are_nearly_right(data: bytes) -> None:
    TARGETS["handshake"](data)


@given(data=transmissions())
def test_transmissions_that_are_nearly_right(data: bytes) -> None:
    TARGETS["transmission"](data)


@given(data=reply_streams())
def test_replies_that_are_nearly_right(data: bytes) -> None:
    TARGETS["replies"](data)


# --- no invalid request touches the device ----------------------------------------------------------------------------


@given(
    command=st.integers(0, 12),
    flags=st.integers(0, 0x7F),
    offset=numbers_64,
    length=numbers_64,
    form=st.sampled_from(["simple", "structured", "extended"]),
    read_only=st.booleans(),
)
def test_a_request_is_executed_exactly_if_it_is_valid(
    command: int, flags: int, offset: int, length: int, form: str, read_only: bool
) -> None:
    if command == Command.DISC:
        return
    extended = form == "extended"
    if not extended:
        length &= 0xFFFFFFFF
    carries = flags & CommandFlag.PAYLOAD_LEN if extended else command == Command.WRITE
    if carries:
        length = min(length, 200_000)
    if extended and command == Command.WRITE and not carries:
        return
    device = MemoryDevice("disk", SIZE_BYTES, read_only=read_only, dirty={"snap": []})
    style = {"structured": form == "structured", "extended": extended}
    contexts = CONTEXTS if form != "simple" else []
    terms = terms_for(device, contexts=contexts, **style)
    refusal = check(terms, flags, command, offset, length)
    terms.session.close()
    request = Request(command, offset, length, flags, b"p" * length if carries else b"")
    outcome = converse(
        device, [request, Request(Command.CACHE, 7, 7)], contexts=contexts, limits=LIMITS, **style
    )
    assert outcome.ended_by is None
    calls = [entry for entry in device.log or [] if entry != ("cache", 7, 7)]
    if refusal is not None:
        assert outcome.errors[0] == refusal.error
        assert calls == []
    elif not (flags & CommandFlag.PAYLOAD_LEN and command == Command.BLOCK_STATUS):
        assert outcome.errors[0] in (0, Errno.ENOTSUP)


# --- requests against an oracle ---------------------------------------------------------------------------------------

ranges = st.tuples(
    st.one_of(st.integers(0, SIZE_BYTES - 1), st.sampled_from([0, 65535, 65536, 131072])),
    st.one_of(st.integers(1, 70_000), st.sampled_from([1, 512, 4096, 65536, 131073])),
)
steps = st.tuples(
    st.sampled_from(["read", "df", "write", "fua", "trim", "zero", "keep"]), ranges, st.integers(1, 255)
)


@given(
    script=st.lists(steps, min_size=1, max_size=12),
    form=st.sampled_from(["simple", "structured", "extended"]),
    piece=st.sampled_from([13, 1000, 65536, 1 << 30]),
    take_max=st.sampled_from([100, 50_000, 1 << 30]),
)
def test_valid_requests_agree_with_an_oracle(
    script: list[tuple[str, tuple[int, int], int]], form: str, piece: int, take_max: int
) -> None:
    device = MemoryDevice("disk", SIZE_BYTES, record=False)
    oracle = bytearray(SIZE_BYTES)
    extended = form == "extended"
    asked: list[Request] = []
    expected: list[bytes | None] = []
    for action, (offset, length), value in script:
        end = min(offset + length, SIZE_BYTES)
        count = end - offset
        flags, payload, command = 0, b"", Command.READ
        if action in ("write", "fua"):
            command, payload = Command.WRITE, bytes([value]) * count
            flags = (CommandFlag.FUA if action == "fua" else 0) | (CommandFlag.PAYLOAD_LEN if extended else 0)
            oracle[offset:end] = payload
        elif action in ("trim", "zero", "keep"):
            command = Command.TRIM if action == "trim" else Command.WRITE_ZEROES
            flags = CommandFlag.NO_HOLE if action == "keep" else 0
            oracle[offset:end] = bytes(count)
        elif action == "df" and form != "simple":
            flags = CommandFlag.DF
        asked.append(Request(command, offset, count, flags, payload))
        expected.append(bytes(oracle[offset:end]) if command is Command.READ else None)
    outcome = converse(
        device,
        asked,
        structured=form == "structured",
        extended=extended,
        piece=piece,
        take_max=take_max,
        limits=LIMITS,
    )
    assert outcome.ended_by is None
    assert outcome.errors == [0] * len(asked)
    for reply, content in zip(outcome.replies, expected, strict=True):
        assert reply is not None
        assert content is None or reply.data == content
    assert device.data == oracle


def test_seeds_are_what_they_claim_to_be() -> None:
    assert encode_export_query("disk", (3,)) == b"\0\0\0\4disk\0\1\0\3"
    assert encode_context_query("", ()) == bytes(8)
