"""Commands: reads with holes, zeroing, trimming, block status. Rows of section 3.3 of docs/nbd.md."""

import errno
import struct

import pytest

from nbd.constants import ChunkType, Command, CommandFlag, Errno
from nbd.device import Extents
from tests.fakes.memory_device import BLOCK_BYTES, MemoryDevice, MemorySession
from tests.fakes.nbd_streams import Outcome, Request, converse, write

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = list(Command)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = list(CommandFlag)
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
SNAP = "qemu:dirty-bitmap:snap"
DATA, HOLE = ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE
KIB = 1024

STYLES = [
    pytest.param({"structured": True}, id="structured"),
    pytest.param({"extended": True}, id="extended"),
]


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> dict[str, bool]:
    return dict(request.param)


@pytest.fixture
def disk() -> MemoryDevice:
    """Blocks 0-1 mapped, 2-3 hole, 4 shared, 5 mapped, the rest hole; the tail is short."""
    device = MemoryDevice(
        "disk", 20 * BLOCK_BYTES + 1000, dirty={"snap": [(BLOCK_BYTES * 3, 0), (BLOCK_BYTES, 1)]}
    )
    for block, kind in ((0, 1), (1, 1), (4, 2), (5, 1)):
        device.kinds[block] = kind
        device.data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([block + 1]) * BLOCK_BYTES
    return device


def content(disk: MemoryDevice, offset: int, length: int) -> bytes:
    return bytes(disk.data[offset : offset + length])


# --- READ
# ------------------------------------------------------------------------------------------------------------


def test_a_read_of_a_hole_is_a_hole_chunk(disk: MemoryDevice, style: dict[str, bool]) -> None:
    (reply,) = converse(disk, [Request(READ, 2 * BLOCK_BYTES + 5, 100_000)], **style).replies
    assert reply.chunks == [HOLE]
    assert reply.holes == [(2 * BLOCK_BYTES + 5, 100_000)]
    assert 2 not in disk.kinds[2:4]


def test_a_mixed_read_has_few_large_chunks(disk: MemoryDevice, style: dict[str, bool]) -> None:
    (reply,) = converse(disk, [Request(READ, 100, 8 * BLOCK_BYTES)], **style).replies
    assert reply.data == content(disk, 100, 8 * BLOCK_BYTES)
    assert reply.chunks == [DATA, HOLE, DATA, HOLE]
    assert all(offset % 512 == 0 for offset, _ in reply.holes)


def test_small_holes_travel_as_zeros(disk: MemoryDevice, style: dict[str, bool]) -> None:
    (reply,) = converse(disk, [Request(READ, BLOCK_BYTES, BLOCK_BYTES + 20_000)], **style).replies
    assert reply.data == content(disk, BLOCK_BYTES, BLOCK_BYTES + 20_000)
    assert DATA in reply.chunks
    assert HOLE not in reply.chunks


def test_a_simple_read_has_its_zeros(disk: MemoryDevice) -> None:
    (reply,) = converse(disk, [Request(READ, 0, disk.size_bytes)]).replies
    assert reply.data == content(disk, 0, disk.size_bytes)


@pytest.mark.parametrize("length", [1, 65536, 8 * BLOCK_BYTES, 20 * BLOCK_BYTES])
def test_df_gives_one_content_chunk(disk: MemoryDevice, style: dict[str, bool], length: int) -> None:
    (reply,) = converse(disk, [Request(READ, 0, length, DF)], **style).replies
    assert reply.data == content(disk, 0, length)
    assert sum(kind in (DATA, HOLE) for kind in reply.chunks) == 1


def test_df_on_a_hole_is_one_hole(disk: MemoryDevice, style: dict[str, bool]) -> None:
    (reply,) = converse(disk, [Request(READ, 2 * BLOCK_BYTES, 4096, DF)], **style).replies
    assert reply.chunks == [HOLE]


def test_reading_allocates_nothing(disk: MemoryDevice, style: dict[str, bool]) -> None:
    before = bytes(disk.kinds)
    converse(disk, [Request(READ, 0, disk.size_bytes)], **style)
    assert bytes(disk.kinds) == before
    assert not {entry[0] for entry in disk.log or []} & {"write", "zero", "trim"}


# --- WRITE, FLUSH
# ----------------------------------------------------------------------------------------------------


def test_a_full_device_answers_no_space_and_goes_on(disk: MemoryDevice, style: dict[str, bool]) -> None:
    disk.fail["write"] = OSError(errno.ENOSPC, "pool full")
    extended = bool(style.get("extended"))
    requests = [write(0, b"x" * 512, extended=extended), Request(READ, 0, 512), Request(FLUSH)]
    outcome = converse(disk, requests, **style)
    assert outcome.errors == [Errno.ENOSPC, 0, 0]
    assert outcome.replies[1].data == bytes([1]) * 512


def test_flush_ignores_its_reserved_fields(disk: MemoryDevice) -> None:
    requests = [Request(FLUSH, 1 << 60, 12345), Request(FLUSH, (1 << 64) - 1, 0xFFFFFFFF)]
    assert converse(disk, requests).errors == [0, 0]


def test_flush_follows_the_writes_before_it(disk: MemoryDevice) -> None:
    assert converse(disk, [write(0, b"a"), Request(FLUSH), write(1, b"b")]).errors == [0, 0, 0]
    assert [entry[0] for entry in disk.log or []] == ["write", "flush", "write"]


def test_a_failing_flush_is_an_error_each_time(disk: MemoryDevice) -> None:
    disk.fail["flush"] = OSError(errno.EIO, "lost")
    assert converse(disk, [Request(FLUSH), Request(FLUSH)]).errors == [Errno.EIO, Errno.EIO]


def test_flush_on_a_read_only_export_succeeds() -> None:
    disk = MemoryDevice("disk", 4096, read_only=True)
    assert converse(disk, [Request(FLUSH)]).errors == [0]


# --- TRIM, WRITE_ZEROES, CACHE
# -----------------------------------------------------------------------------------------


def test_trim_unmaps_and_reads_as_zeros(disk: MemoryDevice, style: dict[str, bool]) -> None:
    requests = [Request(TRIM, 0, 2 * BLOCK_BYTES), Request(READ, 0, 4096), Request(STATUS, 0, BLOCK_BYTES)]
    outcome = converse(disk, requests, contexts=[BASE], **style)
    assert outcome.errors == [0, 0, 0]
    assert outcome.replies[1].data == bytes(4096)
    assert outcome.replies[2].statuses == {1: [(BLOCK_BYTES, 3)]}


def test_trim_of_a_part_spares_the_neighbours(disk: MemoryDevice) -> None:
    outcome = converse(disk, [Request(TRIM, 100, 50), Request(READ, 0, 300)])
    data = outcome.replies[1].data
    assert data[:100] == bytes([1]) * 100
    assert data[150:] == bytes([1]) * 150


def test_write_zeroes_passes_its_flags_on(disk: MemoryDevice) -> None:
    requests = [Request(ZEROES, 0, 4096, flags) for flags in (0, NO_HOLE, FAST_ZERO)]
    assert converse(disk, requests).errors == [0, 0, 0]
    calls = [entry[3:] for entry in disk.log or []]
    assert calls == [(False, False), (True, False), (False, True)]


def test_a_fast_zero_that_is_not_fast_is_not_supported(disk: MemoryDevice, style: dict[str, bool]) -> None:
    requests = [Request(ZEROES, 0, 4096, FAST_ZERO | NO_HOLE), Request(READ, 0, 4096)]
    outcome = converse(disk, requests, **style)
    assert outcome.errors == [Errno.ENOTSUP, 0]
    assert outcome.replies[1].data == bytes([1]) * 4096


def test_a_plain_zero_is_never_unsupported(disk: MemoryDevice) -> None:
    disk.fail["zero"] = OSError(errno.ENOTSUP, "cannot")
    assert (
        converse(disk, [Request(ZEROES, 0, 512), Request(ZEROES, 0, 512, NO_HOLE)]).errors == [Errno.EIO] * 2
    )


def test_cache_failing_does_not_hurt_later_requests(disk: MemoryDevice) -> None:
    disk.fail["cache"] = OSError(errno.EIO, "no")
    requests = [Request(CACHE, 0, 4096), Request(CACHE, 0, 4096, FUA), Request(READ, 0, 8)]
    assert converse(disk, requests).errors == [Errno.EIO, Errno.EIO, 0]


# --- BLOCK_STATUS
# ------------------------------------------------------------------------------------------------------


def status(disk: MemoryDevice, style: dict[str, bool], *requests: Request, contexts: list[str]) -> Outcome:
    return converse(disk, requests, contexts=contexts, **style)


def test_block_status_needs_a_context(disk: MemoryDevice, style: dict[str, bool]) -> None:
    assert status(disk, style, Request(STATUS, 0, 512), contexts=[]).errors == [Errno.EINVAL]
    assert converse(disk, [Request(STATUS, 0, 512)]).errors == [Errno.EINVAL]


def test_base_allocation_says_hole_or_data(disk: MemoryDevice, style: dict[str, bool]) -> None:
    outcome = status(disk, style, Request(STATUS, 0, disk.size_bytes), contexts=[BASE])
    block = BLOCK_BYTES
    assert outcome.replies[0].statuses == {
        1: [(2 * block, 0), (2 * block, 3), (2 * block, 0), (14 * block + 1000, 3)]
    }


def test_allocation_depth_tells_shared_from_own(disk: MemoryDevice, style: dict[str, bool]) -> None:
    outcome = status(disk, style, Request(STATUS, 0, disk.size_bytes), contexts=[DEPTH])
    block = BLOCK_BYTES
    assert outcome.replies[0].statuses == {
        1: [(2 * block, 1), (2 * block, 0), (block, 2), (block, 1), (14 * block + 1000, 0)]
    }


def test_dirty_bitmap_comes_from_the_device(disk: MemoryDevice, style: dict[str, bool]) -> None:
    outcome = status(disk, style, Request(STATUS, BLOCK_BYTES, 4 * BLOCK_BYTES), contexts=[SNAP])
    assert outcome.replies[0].statuses == {1: [(2 * BLOCK_BYTES, 0), (BLOCK_BYTES, 1), (BLOCK_BYTES, 0)]}


def test_every_selected_context_has_one_chunk(disk: MemoryDevice, style: dict[str, bool]) -> None:
    outcome = status(disk, style, Request(STATUS, 10, 5000), contexts=[DEPTH, SNAP, BASE])
    reply = outcome.replies[0]
    assert reply.statuses == {1: [(5000, 1)], 2: [(5000, 0)], 3: [(5000, 0)]}
    kind = ChunkType.BLOCK_STATUS_EXT if style.get("extended") else ChunkType.BLOCK_STATUS
    assert reply.chunks == [kind] * 3
    assert [entry[0] for entry in disk.log or []].count("extents") == 1


def test_req_one_gives_one_extent(disk: MemoryDevice, style: dict[str, bool]) -> None:
    outcome = status(
        disk, style, Request(STATUS, 5, disk.size_bytes - 5, REQ_ONE), contexts=[BASE, DEPTH, SNAP]
    )
    block = BLOCK_BYTES
    assert outcome.replies[0].statuses == {
        1: [(2 * block - 5, 0)],
        2: [(2 * block - 5, 1)],
        3: [(3 * block - 5, 0)],
    }


def test_extents_are_clipped_to_the_request_and_never_empty(
    disk: MemoryDevice, style: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(self: MemorySession, offset: int, length: int) -> Extents:
        return [(0, 0), (100, 1), (100, 1), (0, 2), (1 << 40, 0), (5, 1)]

    monkeypatch.setattr(MemorySession, "extents", odd)
    outcome = status(disk, style, Request(STATUS, 0, 5000), contexts=[BASE])
    assert outcome.replies[0].statuses == {1: [(200, 0), (4800, 3)]}


def test_a_device_without_an_answer_is_an_io_error(
    disk: MemoryDevice, style: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemorySession, "extents", lambda *_: [])
    assert status(disk, style, Request(STATUS, 0, 5000), contexts=[BASE]).errors == [Errno.EIO]
    disk.fail["dirty"] = OSError(errno.EIO, "no")
    assert status(disk, style, Request(STATUS, 0, 5000), contexts=[SNAP]).errors == [Errno.EIO]


def test_the_number_of_extents_is_bounded(style: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDevice("disk", 1 << 30, record=False)
    monkeypatch.setattr(MemorySession, "extents", lambda *_: [(512, number % 2) for number in range(100_000)])
    outcome = status(disk, style, Request(STATUS, 0, 1 << 30), contexts=[BASE])
    assert len(outcome.replies[0].statuses[1]) == 1 << 15


@pytest.mark.parametrize("length", [(1 << 32) - 1, (1 << 32) - 512])
def test_lengths_near_4_gib_are_clipped_not_truncated(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of another server: the length went modulo 2^32."""
    disk = MemoryDevice("disk", 4096)
    disk.size_bytes = 1 << 50
    monkeypatch.setattr(MemorySession, "extents", lambda *_: [(1 << 45, 0)])
    request = [Request(STATUS, 0, length)]
    compact = status(disk, {"structured": True}, *request, contexts=[BASE, DEPTH]).replies[0]
    assert compact.statuses == {1: [((1 << 32) - 65536, 3)], 2: [((1 << 32) - 65536, 0)]}
    request[0].cookie = -1
    wide = status(disk, {"extended": True}, *request, contexts=[BASE]).replies[0]
    assert wide.statuses == {1: [(length, 3)]}


def test_extended_status_is_64_bit_even_when_small(disk: MemoryDevice) -> None:
    reply = status(disk, {"extended": True}, Request(STATUS, 0, 1), contexts=[BASE]).replies[0]
    assert reply.chunks == [ChunkType.BLOCK_STATUS_EXT]
    huge = MemoryDevice("huge", 4096)
    huge.size_bytes = 1 << 60
    huge.kinds = bytearray(1)


def test_a_filter_selects_contexts(disk: MemoryDevice) -> None:
    payload = struct.pack(">QII", 4096, 3, 1)
    request = Request(STATUS, 0, len(payload), PAYLOAD_LEN, payload)
    reply = status(disk, {"extended": True}, request, contexts=[BASE, DEPTH, SNAP]).replies[0]
    assert reply.error == 0
    assert list(reply.statuses) == [3, 1]


def test_a_filter_may_select_nothing(disk: MemoryDevice) -> None:
    request = Request(STATUS, 0, 8, PAYLOAD_LEN, struct.pack(">Q", 4096))
    reply = status(disk, {"extended": True}, request, contexts=[BASE]).replies[0]
    assert (reply.error, reply.statuses, reply.chunks) == (0, {}, [0])


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(7),
        struct.pack(">QH", 4096, 1),
        struct.pack(">QI", 4096, 99),
        struct.pack(">QI", 4096, 0),
        struct.pack(">QII", 4096, 1, 1),
        struct.pack(">QI", 0, 1),
        struct.pack(">QI", 1 << 63, 1),
        struct.pack(">Q", 512) + struct.pack(">I", 1) * 100,
        bytes(100_000),
        bytes(1_000_000),
    ],
)
def test_a_malformed_filter_is_consumed_and_invalid(disk: MemoryDevice, payload: bytes) -> None:
    requests = [Request(STATUS, 0, len(payload), PAYLOAD_LEN, payload), Request(READ, 0, 8)]
    assert status(disk, {"extended": True}, *requests, contexts=[BASE]).errors == [Errno.EINVAL, 0]


def test_a_filter_that_was_not_advertised_is_invalid(disk: MemoryDevice) -> None:
    payload = struct.pack(">QI", 4096, 1)
    requests = [Request(STATUS, 0, len(payload), PAYLOAD_LEN, payload), Request(READ, 0, 8)]
    assert status(disk, {"extended": True}, *requests, contexts=[]).errors == [Errno.EINVAL, 0]


def test_a_filter_checks_the_inner_range(disk: MemoryDevice) -> None:
    payload = struct.pack(">QI", disk.size_bytes, 1)
    request = Request(STATUS, 1, len(payload), PAYLOAD_LEN, payload)
    assert status(disk, {"extended": True}, request, contexts=[BASE]).errors == [Errno.EINVAL]
