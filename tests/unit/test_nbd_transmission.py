"""Transmission: framing, reply forms, flags, errors. Rows of section 3.1 of docs/nbd.md.

The loop runs over a scripted stream; what it sends is decoded by the client's strict decoder, so every test also checks that
no chunk overlaps, is empty, or comes behind DONE.
"""

import errno

import pytest

from nbd.constants import ChunkType, Command, CommandFlag, Errno
from nbd.errors import ConnectionEnded, RemoteProtocolError
from nbd.limits import Limits
from nbd.validation import check
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_streams import Request, ScriptedLink, converse, run_transmission, terms_for, write

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = list(Command)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = list(CommandFlag)
BASE = "base:allocation"

FORMS = [
    pytest.param({"structured": False, "extended": False}, id="simple"),
    pytest.param({"structured": True, "extended": False}, id="structured"),
    pytest.param({"structured": False, "extended": True}, id="extended"),
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> dict[str, bool]:
    return dict(request.param)


@pytest.fixture
def disk() -> MemoryDevice:
    device = MemoryDevice("disk", 4 << 20)
    device.data[:] = bytes(range(256)) * (len(device.data) // 256)
    device.kinds[:] = b"\1" * len(device.kinds)
    return device


def touched(disk: MemoryDevice) -> list[object]:
    assert disk.log is not None
    return [entry[0] for entry in disk.log]


@pytest.mark.parametrize("piece", [1, 7, 29, 4096, 1 << 30])
@pytest.mark.parametrize("pending", [0, 3, 40])
def test_requests_may_come_in_any_pieces(
    disk: MemoryDevice, form: dict[str, bool], piece: int, pending: int
) -> None:
    before = bytes(disk.data[:9000])
    requests = [
        Request(READ, 0, 100),
        write(200, b"new" * 50, extended=form["extended"]),
        Request(READ, 200, 150),
        Request(FLUSH),
        write(70_000, bytes(5000), extended=form["extended"]),
        Request(READ, 0, 9000),
        Request(DISC),
    ]
    outcome = converse(disk, requests, piece=piece, pending=pending, **form)
    assert outcome.ended_by is None
    assert outcome.errors == [0, 0, 0, 0, 0, 0, None]
    assert outcome.replies[0].data == before[:100]
    assert outcome.replies[2].data == b"new" * 50
    assert outcome.replies[5].data == before[:200] + b"new" * 50 + before[350:9000]
    assert disk.data[70_000:75_000] == bytes(5000)


@pytest.mark.parametrize("take_max", [1, 13, 5000])
def test_replies_are_completed_after_partial_sends(
    disk: MemoryDevice, form: dict[str, bool], take_max: int
) -> None:
    requests = [Request(READ, at, 3000) for at in range(0, 30_000, 3000)]
    outcome = converse(disk, requests, take_max=take_max, **form)
    assert [reply.data for reply in outcome.replies] == [
        disk.data[at : at + 3000] for at in range(0, 30_000, 3000)
    ]


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x12560953, 0x96744668, 0xFFFFFFFF, 0x67446698])
def test_a_bad_request_magic_ends_the_connection(
    disk: MemoryDevice, form: dict[str, bool], magic: int
) -> None:
    outcome = converse(disk, [Request(READ, 0, 10), Request(READ, 0, 10, magic=magic)], **form)
    assert isinstance(outcome.ended_by, RemoteProtocolError)
    assert outcome.errors == [0, None]


def test_the_magic_must_be_that_of_the_negotiated_form(disk: MemoryDevice) -> None:
    outcome = converse(disk, [Request(READ, 0, 10, magic=0x21E41C71)], structured=True)
    assert isinstance(outcome.ended_by, RemoteProtocolError)
    outcome = converse(disk, [Request(READ, 0, 10, magic=0x25609513)], extended=True)
    assert isinstance(outcome.ended_by, RemoteProtocolError)


def test_cookies_come_back_unchanged(disk: MemoryDevice, form: dict[str, bool]) -> None:
    cookies = [0, 1, (1 << 64) - 1, 0x8000000000000000, 0x0102030405060708]
    requests = [Request(READ, 0, 16, cookie=cookie) for cookie in cookies]
    requests += [Request(77, cookie=cookie ^ 0x55) for cookie in cookies]
    assert converse(disk, requests, **form).errors == [0] * 5 + [Errno.EINVAL] * 5


def test_requests_with_equal_cookies_are_answered_each(disk: MemoryDevice) -> None:
    requests = [Request(FLUSH, cookie=7) for _ in range(5)] + [Request(CACHE, 0, 512, cookie=7)]
    data = b"".join(request.encode(extended=False) for request in requests)
    link = ScriptedLink(data)
    assert run_transmission(link, terms_for(disk)) is None
    assert bytes(link.output) == (b"\x67\x44\x66\x98" + bytes(4) + bytes(7) + b"\x07") * 6


def test_simple_mode_knows_only_simple_replies(disk: MemoryDevice) -> None:
    requests = [Request(READ, 0, 100), write(0, b"x"), Request(FLUSH), Request(TRIM, 0, 512), Request(99)]
    outcome = converse(disk, requests)
    assert len(outcome.link.output) == 5 * 16 + 100
    assert all(reply.chunks == [] for reply in outcome.replies)


@pytest.mark.parametrize("fault", ["range", "flags", "device"])
def test_structured_reads_are_chunks_also_when_they_fail(disk: MemoryDevice, fault: str) -> None:
    request = {
        "range": Request(READ, disk.size_bytes, 1),
        "flags": Request(READ, 0, 1, FAST_ZERO),
        "device": Request(READ, 0, 1),
    }[fault]
    if fault == "device":
        disk.fail["read"] = OSError(errno.EIO, "bad sector")
    (reply,) = converse(disk, [request], structured=True).replies
    assert reply.chunks == [ChunkType.ERROR]
    assert reply.error == (Errno.EIO if fault == "device" else Errno.EINVAL)
    assert reply.text


def test_structured_errors_of_every_command_carry_a_text(disk: MemoryDevice) -> None:
    size = disk.size_bytes
    requests = [Request(command, size, 512) for command in (TRIM, ZEROES, CACHE, STATUS)]
    requests += [Request(WRITE, size, 4, payload=b"xxxx"), Request(99), Request(FLUSH, flags=DF)]
    for reply in converse(disk, requests, structured=True).replies:
        assert reply.chunks == [ChunkType.ERROR]
        assert 0 < len(reply.text.encode()) <= 4096


def test_extended_mode_knows_only_extended_chunks(disk: MemoryDevice) -> None:
    requests = [
        Request(READ, 4096, 100),
        write(8192, b"x", extended=True),
        Request(FLUSH, 0, 0),
        Request(TRIM, 65536, 512),
        Request(99, 12345, 0),
        Request(READ, 4096, 0),
    ]
    outcome = converse(disk, requests, extended=True)  # the decoder checks that each chunk repeats the offset
    assert [reply.chunks for reply in outcome.replies] == [[1], [0], [0], [0], [0x8001], [0]]


@pytest.mark.parametrize("length", [1, 65536, 65537, 300_000, 2 << 20])
def test_done_comes_once_and_last(disk: MemoryDevice, form: dict[str, bool], length: int) -> None:
    (reply,) = converse(disk, [Request(READ, 17, length)], **form).replies
    assert reply.data == disk.data[17 : 17 + length]
    if form["structured"] or form["extended"]:
        assert reply.chunks == ([1] if length <= 65536 else [1, 0])


def test_a_failed_simple_read_is_a_header_only(disk: MemoryDevice) -> None:
    disk.fail["read"] = OSError(errno.EIO, "bad")
    outcome = converse(disk, [Request(READ, 0, 4096), Request(FLUSH)])
    assert outcome.errors == [Errno.EIO, 0]
    assert len(outcome.link.output) == 32


def test_one_failing_request_does_not_hurt_its_neighbours(disk: MemoryDevice, form: dict[str, bool]) -> None:
    extended = form["extended"]
    requests = [
        Request(READ, 0, 64),
        write(4096, b"a" * 64, extended=extended),
        Request(READ, disk.size_bytes - 1, 2),
        write(disk.size_bytes - 1, b"toolong", extended=extended),
        Request(READ, 4096, 64),
        Request(55),
        Request(READ, 64, 64),
    ]
    outcome = converse(disk, requests, **form)
    assert outcome.errors == [0, 0, Errno.EINVAL, Errno.ENOSPC, 0, Errno.EINVAL, 0]
    assert outcome.replies[4].data == b"a" * 64


@pytest.mark.parametrize(
    ("host", "wire"),
    [
        (errno.EPERM, Errno.EPERM),
        (errno.EACCES, Errno.EPERM),
        (errno.EROFS, Errno.EPERM),
        (errno.EIO, Errno.EIO),
        (errno.EINVAL, Errno.EINVAL),
        (errno.ENOSPC, Errno.ENOSPC),
        (errno.EDQUOT, Errno.ENOSPC),
        (errno.EFBIG, Errno.ENOSPC),
        (errno.ESHUTDOWN, Errno.ESHUTDOWN),
        (errno.ENOTSUP, Errno.EIO),
        (errno.EOVERFLOW, Errno.EIO),
        (errno.ENXIO, Errno.EIO),
        (errno.EBADF, Errno.EIO),
        (0, Errno.EIO),
    ],
)
def test_host_errors_become_errors_of_the_protocol(
    disk: MemoryDevice, form: dict[str, bool], host: int, wire: Errno
) -> None:
    for operation in ("write", "flush", "trim", "zero", "cache"):
        disk.fail[operation] = OSError(host, "host says no")
    requests = [
        write(0, b"data", extended=form["extended"]),
        Request(FLUSH),
        Request(TRIM, 0, 512),
        Request(ZEROES, 0, 512),
        Request(CACHE, 0, 512),
        Request(READ, 0, 512),
    ]
    assert converse(disk, requests, **form).errors == [wire] * 5 + [0]


@pytest.mark.parametrize("command", [8, 9, 100, 0xFFFF])
def test_unknown_commands_are_refused_and_have_no_payload(
    disk: MemoryDevice, form: dict[str, bool], command: int
) -> None:
    outcome = converse(disk, [Request(command, 0, 4096), Request(READ, 0, 8)], **form)
    assert outcome.errors == [Errno.EINVAL, 0]


def test_resize_is_refused(disk: MemoryDevice, form: dict[str, bool]) -> None:
    assert converse(disk, [Request(8, 0, 8 << 20)], **form).errors == [Errno.EINVAL]


def test_an_unknown_extended_command_may_have_a_payload(disk: MemoryDevice) -> None:
    requests = [Request(99, 0, 300_000, PAYLOAD_LEN, bytes(300_000)), Request(READ, 0, 8)]
    assert converse(disk, requests, extended=True).errors == [Errno.EINVAL, 0]


ILLEGAL_FLAGS = [
    (READ, [NO_HOLE, REQ_ONE, FAST_ZERO, 0x40, 0x8000]),
    (WRITE, [NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x40, 0x8000]),
    (FLUSH, [NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x40]),
    (TRIM, [NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x40]),
    (CACHE, [NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x40]),
    (ZEROES, [DF, REQ_ONE, 0x40, 0x8000]),
    (STATUS, [NO_HOLE, DF, FAST_ZERO, 0x40]),
]


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, flags in ILLEGAL_FLAGS for flag in flags]
)
@pytest.mark.parametrize("extra", [0, FUA])
def test_illegal_flags_are_refused_and_nothing_is_done(
    disk: MemoryDevice, form: dict[str, bool], command: Command, flag: int, extra: int
) -> None:
    payload = b"x" * 512 if command is WRITE else b""
    flags = flag | extra | (PAYLOAD_LEN if command is WRITE and form["extended"] else 0)
    contexts = [BASE] if form != {"structured": False, "extended": False} else []
    outcome = converse(
        disk,
        [Request(command, 0, 512, flags, payload), Request(READ, 0, 8)],
        contexts=contexts,
        **form,
    )
    assert outcome.errors == [Errno.EINVAL, 0]
    assert touched(disk) == ["read"]


def test_df_needs_structured_or_extended_replies(disk: MemoryDevice, form: dict[str, bool]) -> None:
    plain = form == {"structured": False, "extended": False}
    expected = Errno.EINVAL if plain else 0
    assert converse(disk, [Request(READ, 0, 65536, DF)], **form).errors == [expected]


def test_fast_zero_needs_its_flag_to_be_advertised(disk: MemoryDevice) -> None:
    terms = terms_for(disk)
    without = terms_for(disk, flags=terms.flags & ~0x800)
    assert check(terms, FAST_ZERO, ZEROES, 0, 512) is None
    refusal = check(without, FAST_ZERO, ZEROES, 0, 512)
    assert refusal is not None
    assert refusal.error == Errno.EINVAL


def test_fua_is_accepted_on_every_command(disk: MemoryDevice) -> None:
    requests = [Request(command, 0, 512, FUA) for command in (READ, FLUSH, TRIM, CACHE, ZEROES, STATUS)]
    requests.append(write(0, b"x" * 512, flags=FUA))
    outcome = converse(disk, requests, structured=True, contexts=[BASE])
    assert outcome.errors == [0] * 7


def test_fua_makes_changes_durable_before_the_reply(disk: MemoryDevice, form: dict[str, bool]) -> None:
    requests = [
        write(0, b"x" * 512, flags=FUA, extended=form["extended"]),
        Request(TRIM, 0, 512, FUA),
        Request(ZEROES, 0, 512, FUA),
    ]
    assert converse(disk, requests, **form).errors == [0, 0, 0]
    assert touched(disk) == ["write", "flush", "trim", "flush", "zero", "flush"]
    disk.fail["flush"] = OSError(errno.EIO, "disk full of holes")
    for request in requests:
        request.cookie = -1
    assert converse(disk, requests, **form).errors == [Errno.EIO] * 3


def test_payload_len_is_unknown_in_compact_mode(disk: MemoryDevice) -> None:
    for structured in (False, True):
        requests = [
            Request(READ, 0, 512, PAYLOAD_LEN),
            Request(WRITE, 0, 512, PAYLOAD_LEN, bytes(512)),
            Request(READ, 0, 8),
        ]
        outcome = converse(disk, requests, structured=structured)
        assert outcome.errors == [Errno.EINVAL, Errno.EINVAL, 0]


def test_validation_goes_in_a_fixed_order() -> None:
    disk = MemoryDevice("disk", 65536, read_only=True)
    terms = terms_for(disk, structured=True)
    beyond = 1 << 40

    def refused(flags: int, command: int, offset: int, length: int) -> Errno:
        refusal = check(terms, flags, command, offset, length)
        assert refusal is not None
        return refusal.error

    assert refused(0x40, 99, beyond, 0) == Errno.EINVAL  # command, before everything
    assert refused(0x40, WRITE, beyond, 1) == Errno.EINVAL  # flags, before read-only
    assert refused(0, WRITE, beyond, 1) == Errno.EPERM  # read-only, before the range
    assert refused(0, READ, beyond, 1) == Errno.EINVAL  # range


def test_a_payload_is_consumed_before_the_error_goes_out(disk: MemoryDevice, form: dict[str, bool]) -> None:
    data = b"p" * 1_000_000
    requests = [write(disk.size_bytes - 5, data, extended=form["extended"]), Request(READ, 0, 8)]
    outcome = converse(disk, requests, piece=10_000, **form)
    assert outcome.errors == [Errno.ENOSPC, 0]
    assert touched(disk) == ["read"]


def test_replies_go_out_before_the_loop_waits_for_a_payload(disk: MemoryDevice) -> None:
    """A client that sends READ and half a WRITE gets its READ answered."""
    whole = write(0, bytes(1000))
    whole.cookie = 2
    data = Request(READ, 0, 8, cookie=1).encode(extended=False) + whole.encode(extended=False)
    link = ScriptedLink(data[:100])
    assert isinstance(run_transmission(link, terms_for(disk)), ConnectionEnded)
    assert len(link.output) == 16 + 8


def test_batches_are_bounded_by_reply_bytes(disk: MemoryDevice) -> None:
    requests = [Request(READ, 0, 65536) for _ in range(100)]
    outcome = converse(disk, requests, limits=Limits(batch_bytes=100_000))
    assert outcome.errors == [0] * 100


# --- data that cannot be read while it is being sent ---------------------------------------------------------------


@pytest.mark.parametrize("fault_at", [0, 5, 16, 2000, 4112, 5000, 8224, 8230])
def test_a_fault_while_sending_small_reads(disk: MemoryDevice, form: dict[str, bool], fault_at: int) -> None:
    """What was not begun is answered again from copies; a reply that was begun cannot be finished."""
    requests = [Request(READ, at * 4096, 4096) for at in range(3)]
    outcome = converse(disk, requests, fault_at=fault_at, **form)
    head = {"simple": 16, "structured": 28, "extended": 40}[
        "extended" if form["extended"] else "structured" if form["structured"] else "simple"
    ]
    begun = fault_at % (4096 + head) != 0
    if begun:
        assert outcome.ended_by is not None
    else:
        assert outcome.ended_by is None
        assert outcome.errors == [0, 0, 0]
        assert [reply.data for reply in outcome.replies] == [
            disk.data[at : at + 4096] for at in (0, 4096, 8192)
        ]
        assert "read_copy" in touched(disk)


def test_a_fault_before_a_read_begins_becomes_eio(disk: MemoryDevice, form: dict[str, bool]) -> None:
    disk.fail["read_copy"] = OSError(errno.EIO, "bad sector")
    requests = [Request(READ, 0, 4096), write(0, b"w", extended=form["extended"]), Request(READ, 4096, 64)]
    outcome = converse(disk, requests, fault_at=0, **form)
    assert outcome.ended_by is None
    assert outcome.errors == [Errno.EIO, 0, Errno.EIO]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("inside", [60, 65536, 199_999])
def test_a_fault_inside_a_large_chunk_is_padded_and_told(
    disk: MemoryDevice, extended: bool, inside: int
) -> None:
    requests = [
        Request(READ, 0, 512),
        Request(READ, 1000, 200_000),
        write(0, b"w", extended=extended),
        Request(READ, 0, 512),
    ]
    before = (40 if extended else 28) + 512
    outcome = converse(disk, requests, fault_at=before + inside, structured=not extended, extended=extended)
    assert outcome.ended_by is None
    assert outcome.errors == [0, Errno.EIO, 0, 0]
    failed = outcome.replies[1]
    assert failed.chunks == [ChunkType.OFFSET_DATA, ChunkType.ERROR_OFFSET]
    assert 1000 <= failed.error_offset < 201_000
    assert outcome.replies[3].data[:1] == b"w"


def test_a_fault_inside_a_simple_read_ends_the_connection(disk: MemoryDevice) -> None:
    outcome = converse(disk, [Request(READ, 0, 512), Request(READ, 0, 200_000)], fault_at=100_000)
    assert "could not be read" in str(outcome.ended_by)
    assert outcome.errors[0] == 0
