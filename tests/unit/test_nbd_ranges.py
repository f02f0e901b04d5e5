"""Ranges, sizes and payloads: rows of section 3.2 of docs/nbd.md."""

import tracemalloc

import pytest

from nbd.constants import Command, CommandFlag, Errno
from nbd.errors import ConnectionEnded, RemoteProtocolError
from nbd.limits import Limits
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_streams import (
    Request,
    ScriptedLink,
    converse,
    pieces,
    run_transmission,
    terms_for,
    write,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = list(Command)
PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN
BASE = "base:allocation"
MIB = 1 << 20
ODD = 1_000_003  # an export size that is no multiple of anything

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
    return MemoryDevice("disk", ODD)


def touched(disk: MemoryDevice) -> list[object]:
    assert disk.log is not None
    return [entry[0] for entry in disk.log]


BEYOND = [(ODD, 1), (ODD - 1, 2), (ODD + 5, 1), (1 << 62, 512), ((1 << 64) - 1, 1), ((1 << 64) - 512, 4096)]


@pytest.mark.parametrize(("offset", "length"), BEYOND)
def test_reading_commands_beyond_the_end_are_invalid(
    disk: MemoryDevice, form: dict[str, bool], offset: int, length: int
) -> None:
    chunked = form["structured"] or form["extended"]
    requests = [Request(command, offset, length) for command in (READ, TRIM, CACHE, STATUS)]
    outcome = converse(disk, requests, contexts=[BASE] if chunked else [], **form)
    assert outcome.errors == [Errno.EINVAL] * 4
    assert touched(disk) == []


@pytest.mark.parametrize(("offset", "length"), BEYOND)
def test_writing_commands_beyond_the_end_have_no_space(
    disk: MemoryDevice, form: dict[str, bool], offset: int, length: int
) -> None:
    requests = [write(offset, b"x" * length, extended=form["extended"]), Request(ZEROES, offset, length)]
    assert converse(disk, requests, **form).errors == [Errno.ENOSPC] * 2
    assert touched(disk) == []


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, ZEROES, STATUS])
@pytest.mark.parametrize(
    ("offset", "length"),
    [((1 << 64) - 1, (1 << 64) - 1), (1, (1 << 64) - 1), (0, 1 << 63), (1 << 63, 1 << 63)],
)
def test_sums_beyond_64_bits_do_not_wrap(
    disk: MemoryDevice, command: Command, offset: int, length: int
) -> None:
    outcome = converse(disk, [Request(command, offset, length)], extended=True, contexts=[BASE])
    assert outcome.errors[0] in (Errno.EINVAL, Errno.ENOSPC)
    assert touched(disk) == []


def test_a_request_partly_beyond_the_end_changes_nothing(disk: MemoryDevice, form: dict[str, bool]) -> None:
    requests = [
        write(ODD - 100, b"x" * 200, extended=form["extended"]),
        write(0, b"x" * (ODD + 1), extended=form["extended"]),
        Request(TRIM, ODD - 100, 200),
        Request(ZEROES, ODD - 100, 200),
    ]
    outcome = converse(disk, requests, **form)
    assert outcome.errors == [Errno.ENOSPC, Errno.ENOSPC, Errno.EINVAL, Errno.ENOSPC]
    assert bytes(disk.data) == bytes(ODD)


def test_the_last_odd_bytes_can_be_used(disk: MemoryDevice, form: dict[str, bool]) -> None:
    requests = [
        write(ODD - 1, b"!", extended=form["extended"]),
        Request(READ, ODD - 3, 3),
        Request(READ, ODD - 1, 1),
    ]
    outcome = converse(disk, requests, **form)
    assert outcome.errors == [0, 0, 0]
    assert outcome.replies[1].data == b"\0\0!"


@pytest.mark.parametrize("offset", [0, 1, 500_000, ODD])
def test_empty_requests_succeed_and_do_nothing(
    disk: MemoryDevice, form: dict[str, bool], offset: int
) -> None:
    requests = [Request(command, offset, 0) for command in (READ, TRIM, CACHE, ZEROES)]
    requests.append(write(offset, b"", extended=form["extended"]))
    outcome = converse(disk, requests, **form)
    assert outcome.errors == [0] * 5
    assert outcome.replies[0].chunks == ([] if form == {"structured": False, "extended": False} else [0])
    assert touched(disk) == []


def test_empty_requests_beyond_the_end_are_refused_alike(disk: MemoryDevice, form: dict[str, bool]) -> None:
    requests = [Request(command, ODD + 1, 0) for command in (READ, TRIM, CACHE, ZEROES)]
    requests.append(write(ODD + 1, b"", extended=form["extended"]))
    inval, nospc = Errno.EINVAL, Errno.ENOSPC
    assert converse(disk, requests, **form).errors == [inval, inval, inval, nospc, nospc]


def test_an_empty_block_status_is_invalid(disk: MemoryDevice) -> None:
    for form in ({"structured": True}, {"extended": True}):
        assert converse(disk, [Request(STATUS, 0, 0)], contexts=[BASE], **form).errors == [Errno.EINVAL]


def test_nothing_is_misaligned_with_a_minimum_of_one(disk: MemoryDevice, form: dict[str, bool]) -> None:
    requests = [
        write(3, b"abc", extended=form["extended"]),
        Request(TRIM, 65537, 7),
        Request(ZEROES, 4, 1),
        Request(READ, 1, 7),
    ]
    outcome = converse(disk, requests, **form)
    assert outcome.errors == [0, 0, 0, 0]
    assert outcome.replies[3].data == b"\0\0a\0c\0\0"


@pytest.mark.parametrize("length", [(64 * MIB) - 1, 64 * MIB])
def test_reads_up_to_64_mib_are_served(form: dict[str, bool], length: int) -> None:
    disk = MemoryDevice("disk", 66 * MIB)
    disk.kinds[:] = b"\1" * len(disk.kinds)
    disk.data[5:9] = b"mark"
    (reply,) = converse(disk, [Request(READ, 4, length)], **form).replies
    assert reply.error == 0
    assert reply.data[1:5] == b"mark"
    assert len(reply.data) == length


def test_longer_reads_are_refused(form: dict[str, bool]) -> None:
    disk = MemoryDevice("disk", 66 * MIB)
    outcome = converse(disk, [Request(READ, 0, 64 * MIB + 512), Request(READ, 0, 8)], **form)
    chunked = form["structured"] or form["extended"]
    assert outcome.errors == [Errno.EOVERFLOW if chunked else Errno.EINVAL, 0]


@pytest.mark.parametrize("piece", [4096, 100_000, 1 << 30])
@pytest.mark.parametrize("length", [256 * 1024, 300_000, 2 * MIB, 2 * MIB + 1, 5 * MIB, 33 * MIB])
def test_large_writes_arrive_whole(form: dict[str, bool], length: int, piece: int) -> None:
    disk = MemoryDevice("disk", 40 * MIB, record=length > MIB)
    data = bytes(range(251)) * (length // 251 + 1)
    data = data[:length]
    requests = [
        Request(READ, 0, 8),
        write(12_345, data, extended=form["extended"]),
        write(0, b"after", extended=form["extended"]),
        Request(READ, 12_345 + length - 8, 16),
    ]
    outcome = converse(disk, requests, piece=piece, **form)
    assert outcome.errors == [0, 0, 0, 0]
    assert disk.data[12_345 : 12_345 + length] == data
    assert disk.data[12_345 + length] == 0
    assert outcome.replies[3].data == data[-8:] + bytes(8)


def test_writes_of_64_mib_are_accepted(form: dict[str, bool]) -> None:
    disk = MemoryDevice("disk", 64 * MIB)
    outcome = converse(disk, [write(0, b"z" * (64 * MIB), extended=form["extended"])], piece=1 << 18, **form)
    assert outcome.errors == [0]
    assert disk.data[-1:] == b"z"


def test_longer_payloads_end_the_connection_without_memory(form: dict[str, bool]) -> None:
    disk = MemoryDevice("disk", 256 * MIB)
    for length in (64 * MIB + 1, (1 << 32) - 1):
        flags = PAYLOAD_LEN if form["extended"] else 0
        tracemalloc.start()
        outcome = converse(disk, [Request(WRITE, 0, length, flags, b"x" * 100_000)], **form)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        tracemalloc.stop()
        assert isinstance(outcome.ended_by, RemoteProtocolError)
    assert touched(disk) == []


def test_a_payload_is_never_allocated_by_its_announced_length(disk: MemoryDevice) -> None:
    big = MemoryDevice("big", 256 * MIB)
    head = Request(WRITE, 0, 60 * MIB, payload=b"x" * 1000)
    head.cookie = 1
    tracemalloc.start()
    ended = run_transmission(ScriptedLink(head.encode(extended=False)), terms_for(big))
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()
    assert isinstance(ended, ConnectionEnded)


def test_a_payload_on_a_command_without_one_is_consumed_and_refused(disk: MemoryDevice) -> None:
    for command in (READ, FLUSH, TRIM, CACHE, ZEROES):
        for size in (0, 4, 300_000):
            requests = [Request(command, 0, size, PAYLOAD_LEN, bytes(size)), Request(READ, 0, 8)]
            assert converse(disk, requests, extended=True).errors == [Errno.EINVAL, 0]
    assert set(touched(disk)) == {"read"}


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, ZEROES, STATUS, 99])
def test_extended_payloads_beyond_the_maximum_end_the_connection(disk: MemoryDevice, command: int) -> None:
    for length in (64 * MIB + 1, 1 << 63):
        outcome = converse(disk, [Request(command, 0, length, PAYLOAD_LEN)], extended=True)
        assert isinstance(outcome.ended_by, RemoteProtocolError)


def test_an_extended_write_without_payload_len_ends_the_connection(disk: MemoryDevice) -> None:
    outcome = converse(disk, [Request(WRITE, 0, 512, 0, bytes(512))], extended=True)
    assert isinstance(outcome.ended_by, RemoteProtocolError)
    assert touched(disk) == []


class Huge(MemoryDevice):
    """A petabyte without memory; every range is one extent."""

    def __init__(self) -> None:
        super().__init__("huge", 4096)
        self.size_bytes = 1 << 50


@pytest.mark.parametrize("length", [(1 << 32) - 1, (1 << 32) - 4096, 1 << 32, 1 << 45])
def test_huge_effect_lengths_are_passed_on(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    disk = Huge()
    monkeypatch.setattr("tests.fakes.memory_device.MemorySession._clear", lambda *_, **__: None)
    for extended in {length >= 1 << 32, True}:
        requests = [
            Request(TRIM, 4096, length),
            Request(ZEROES, 4096, length),
            Request(ZEROES, 4096, length, CommandFlag.FAST_ZERO),
            Request(CACHE, 4096, length),
        ]
        assert converse(disk, requests, extended=extended).errors == [0] * 4
    assert ("trim", 4096, length) in (disk.log or [])


# --- payloads that do not arrive
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 4096, 256 * 1024, 300_000, 2 * MIB])
@pytest.mark.parametrize("got", [0, 1, 0.5, 0.999])
def test_a_client_that_dies_in_a_payload_changes_nothing(
    form: dict[str, bool], length: int, got: float
) -> None:
    disk = MemoryDevice("disk", 4 * MIB)
    request = write(0, b"x" * length, extended=form["extended"])
    request.cookie = 1
    data = request.encode(extended=form["extended"])
    head = len(data) - length
    kept = data[: head + (int(length * got) if got != 1 else 1)]
    link = ScriptedLink(pieces(kept, 50_000))
    assert isinstance(run_transmission(link, terms_for(disk, **form)), ConnectionEnded)
    assert touched(disk) == []
    assert disk.open_sessions == 0


def test_a_client_that_dies_in_a_larger_payload_leaves_whole_pieces_only() -> None:
    disk = MemoryDevice("disk", 8 * MIB)
    request = write(1000, b"x" * (4 * MIB))
    request.cookie = 1
    link = ScriptedLink(pieces(request.encode(extended=False)[: 3 * MIB], 50_000))
    assert isinstance(run_transmission(link, terms_for(disk)), ConnectionEnded)
    ends = [offset + count for _, offset, count in disk.log or []]
    assert ends
    assert all(end % (256 * 1024) == 0 for end in ends)


def test_where_payload_memory_is_used_up_writes_go_on_in_pieces() -> None:
    disk = MemoryDevice("disk", 4 * MIB)
    limits = Limits(payload_memory_bytes=0)
    outcome = converse(disk, [write(77, b"x" * MIB)], piece=10_000, limits=limits)
    assert outcome.errors == [0]
    assert disk.data[77 : 77 + MIB] == b"x" * MIB
    assert len(touched(disk)) > 1


@pytest.mark.parametrize("length", [300_000, MIB, 3 * MIB])
def test_a_device_error_in_a_large_write_is_told_after_the_payload(length: int) -> None:
    disk = MemoryDevice("disk", 4 * MIB)
    disk.fail["write"] = OSError(28, "no space left")
    requests = [write(0, bytes(length)), Request(READ, 0, 8)]
    assert converse(disk, requests, piece=9999).errors == [Errno.ENOSPC, 0]


@pytest.mark.parametrize("length", [10, 300_000, 3 * MIB])
def test_a_read_only_export_refuses_every_change(form: dict[str, bool], length: int) -> None:
    disk = MemoryDevice("disk", 4 * MIB, read_only=True)
    chunked = form["structured"] or form["extended"]
    requests = [
        write(0, bytes(length), extended=form["extended"]),
        Request(TRIM, 0, 512),
        Request(ZEROES, 0, 512),
        Request(READ, 0, 512),
        Request(FLUSH),
        Request(CACHE, 0, 512),
        Request(STATUS, 0, 512),
    ]
    expected: list[int] = [Errno.EPERM] * 3 + [0] * 3 + [0 if chunked else Errno.EINVAL]
    assert converse(disk, requests, contexts=[BASE] if chunked else [], **form).errors == expected
    assert not {"write", "trim", "zero"} & set(touched(disk))
