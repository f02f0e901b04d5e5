"""A base that one side deleted: the nearest snapshot that both have is named, and found; and receiving without doing it."""

from __future__ import annotations

import io
import json
import random
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.test_cli_send import names, place, source, target, thinpool
from tests.fakes.transfer_pools import (
    BLOCK,
    boundaries,
    content,
    new_pool,
    picture,
    stream_of,
    take_in,
    write,
)
from thinpool.common_bases import BASES_MAX, KnownBase, decode_bases, encode_bases, nearest, related
from thinpool.errors import (
    BaseGone,
    BaseMissing,
    DeviceExists,
    ExitCode,
    NoSpace,
    ResumeMismatch,
    StreamDamaged,
    TargetDiverged,
)
from thinpool.pool import Pool
from thinpool.receive_plan import Examined, examine
from thinpool.receiving import ReceiveOptions
from thinpool.stream_format import HEADER_BYTES, RecordHeader, RecordKind

__all__ = ["place", "source", "target"]  # fixtures
MIB = 1 << 20


@dataclass
class Relative:
    name: str
    device_id: int
    origin: str | None
    created: float
    content_id: str | None


def identity(number: int) -> str:
    return str(uuid.UUID(int=number))


def test_related_are_those_that_hang_together_the_nearest_in_time_first() -> None:
    devices = [
        Relative("disk", 1, None, 0, None),  # clients may write to it
        Relative("mon", 2, "disk", 1, identity(1)),
        Relative("tue", 3, "disk", 2, identity(2)),
        Relative("of-tue", 4, "tue", 9, identity(3)),
        Relative("wed", 5, "disk", 3, identity(4)),
        Relative("orphan", 6, "gone", 4, identity(5)),
        Relative("sibling-of-orphan", 7, "gone", 5, identity(6)),
        Relative("other", 8, None, 3, identity(7)),
        Relative("of-other", 9, "other", 3, identity(8)),
    ]
    wed = devices[4]
    assert [base.name for base in related(wed, devices)] == ["tue", "mon", "of-tue"]
    assert [base.name for base in related(devices[5], devices)] == ["sibling-of-orphan"]
    many = [wed, *(Relative(f"s{n}", n + 20, "disk", n, identity(n + 10)) for n in range(BASES_MAX + 5))]
    assert len(related(wed, many)) == BASES_MAX


def test_what_is_told_of_bases_comes_back_and_nonsense_is_refused() -> None:
    told = [KnownBase("mon", identity(1)), KnownBase("Dienstag ä", identity(2))]
    raw = encode_bases(told)
    assert decode_bases(raw) == told
    assert nearest(told, {identity(2), identity(1)}) == told[0]
    assert nearest(told, {identity(3)}) is None
    for cut in range(1, len(raw)):
        if cut != 16 + 2 + 3:
            with pytest.raises(ValueError):  # noqa: PT011 -- whatever it is about
                decode_bases(raw[:cut])


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Pool]:
    """`disk` with a snapshot a day, mon to thu."""
    with new_pool(tmp_path / "here") as pool:
        pool.create_device("disk", 4 * MIB)
        for number, day in enumerate(("mon", "tue", "wed", "thu")):
            write(pool, "disk", number * BLOCK, random.Random(number).randbytes(2 * BLOCK))
            pool.create_snapshot("disk", day, read_only=True)
        pool.create_device("unrelated", 4 * MIB)
        pool.create_snapshot("unrelated", "secret", read_only=True)
        yield pool


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Pool]:
    with new_pool(tmp_path / "there") as pool:
        yield pool


def test_the_refusal_names_the_nearest_snapshot_that_both_sides_have(here: Pool, there: Pool) -> None:
    take_in(there, stream_of(here, "mon"), "mon")
    take_in(there, stream_of(here, "tue", "mon"), "backup-of-tue")
    before = picture(there)
    stream = stream_of(here, "thu", "wed")
    assert b"secret" not in stream
    with pytest.raises(
        BaseMissing, match=r"both sides have is 'tue' \('backup-of-tue' here\).*-i"
    ) as refused:
        take_in(there, stream, "thu")
    assert (refused.value.common_there, refused.value.common_here) == ("tue", "backup-of-tue")
    assert picture(there) == before
    take_in(there, stream_of(here, "thu", refused.value.common_there), "thu")
    assert content(there, "thu") == content(here, "thu")


def test_a_stream_that_tells_of_no_base_or_wrongly_is_refused_all_the_same(here: Pool, there: Pool) -> None:
    stream = stream_of(here, "thu", "wed")
    places = boundaries(stream)
    at = places[1]
    assert RecordHeader.decode(stream[at : at + HEADER_BYTES]).kind == RecordKind.BASES
    for cut in (
        stream[:at],
        stream[: at + 5],
        stream[: at + HEADER_BYTES] + b"x" + stream[at + HEADER_BYTES + 1 :],
    ):
        with pytest.raises(BaseMissing, match="or a full stream"):
            take_in(there, cut, "thu")
    with pytest.raises(BaseMissing, match="or a full stream"):
        take_in(there, stream, "thu")  # nothing is in common


def test_a_base_deleted_at_the_source_is_said_with_those_that_are_left(here: Pool) -> None:
    here.delete("wed")
    with pytest.raises(BaseGone, match=r"'wed'.*related snapshots are 'tue', 'mon'; .*--common"):
        stream_of(here, "thu", "wed")
    for name in ("mon", "tue"):
        here.delete(name)
    with pytest.raises(BaseGone, match=r"no related snapshot.*full stream"):
        stream_of(here, "thu", "wed")


# --- receiving without doing it ---


def plan(pool: Pool, stream: bytes, name: str | None = None) -> Examined:
    return examine(pool, io.BytesIO(stream).readinto, ReceiveOptions(name, dry_run=True))


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(here: Pool, there: Pool) -> None:
    full, tuesday = stream_of(here, "mon"), stream_of(here, "tue", "mon")
    empty = picture(there)
    found = plan(there, full)
    assert (found.name, found.base, found.replaces, found.size_bytes) == ("mon", None, False, 4 * MIB)
    assert (found.data_bytes, found.hole_bytes) == (2 * BLOCK, 0)
    assert picture(there) == empty
    received = take_in(there, full, "m")
    assert found.digest == received.digest
    before = picture(there)
    assert (plan(there, tuesday).base, plan(there, tuesday).replaces) == ("m", False)
    assert (plan(there, tuesday, "m").base, plan(there, tuesday, "m").replaces) == ("m", True)
    assert picture(there) == before


def test_a_dry_run_refuses_what_receiving_would(here: Pool, there: Pool) -> None:
    full, wednesday = stream_of(here, "mon"), stream_of(here, "wed", "tue")
    take_in(there, full, "mon")
    before = picture(there)
    with pytest.raises(BaseMissing, match="both sides have is 'mon'"):
        plan(there, wednesday)
    with pytest.raises(DeviceExists):
        plan(there, full, "mon")
    with pytest.raises(TargetDiverged):
        plan(there, wednesday, "mon")
    for at in range(0, len(full), 997):
        for damaged in (full[:at], full[:at] + bytes([full[at] ^ 4]) + full[at + 1 :]):
            with pytest.raises(StreamDamaged):
                plan(there, damaged, "again")
    with pytest.raises(StreamDamaged):
        take_in(there, full[: boundaries(full)[-2]], "half", resumable=True)
    found = there.transfers.partial("half")
    assert found is not None
    rest = stream_of(here, token=found[1].token)
    assert plan(there, rest, "half").start_bytes > 0
    there.transfers.abort("half")
    with pytest.raises(StreamDamaged):
        take_in(there, stream_of(here, "tue")[:-1], "half", resumable=True)
    with pytest.raises(ResumeMismatch):
        plan(there, rest, "half")
    there.transfers.abort("half")
    assert picture(there) == before


def test_a_dry_run_tells_that_there_is_no_space(here: Pool, tmp_path: Path) -> None:
    write(here, "disk", 0, random.Random(9).randbytes(3 * MIB))
    here.create_snapshot("disk", "fri", read_only=True)
    stream = stream_of(here, "fri")
    with new_pool(tmp_path / "small", size_bytes=32 * BLOCK) as small:
        with pytest.raises(NoSpace):
            plan(small, stream)
        small.grow(64 * BLOCK)
        assert plan(small, stream).free_bytes == 64 * BLOCK


def test_a_dry_run_counts_the_blocks_of_the_pool_that_receives(here: Pool, tmp_path: Path) -> None:
    """Four blocks of 64 KiB far from each other take four of 1 MiB."""
    for at in range(0, 4 * MIB, MIB):
        write(here, "disk", at, random.Random(at).randbytes(BLOCK))
    here.create_snapshot("disk", "fri", read_only=True)
    stream = stream_of(here, "fri")
    with new_pool(tmp_path / "coarse", size_bytes=3 * MIB, block_bytes=MIB) as coarse:
        with pytest.raises(NoSpace):
            plan(coarse, stream)
        with pytest.raises(NoSpace):
            take_in(coarse, stream, "fri")
        coarse.grow(4 * MIB)
        assert plan(coarse, stream).free_bytes == 4 * MIB
        take_in(coarse, stream, "fri")


def test_a_dry_run_that_looks_for_another_base_holds_nobody_up(here: Pool, there: Pool) -> None:
    """The sender may be slow, and the pool is in use."""
    stream, free = io.BytesIO(stream_of(here, "wed", "tue")), list[bool]()

    def look() -> None:
        free.append(there.engine.transaction.acquire(timeout=2))
        if free[-1]:
            there.engine.transaction.release()

    def read_into(buffer: memoryview) -> int:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return stream.readinto(buffer)

    with pytest.raises(BaseMissing):
        examine(there, read_into, ReceiveOptions(dry_run=True))
    assert all(free)


@pytest.mark.parametrize("served", [False, True])
def test_the_commands_find_a_common_base_and_receive_dry(source: Path, target: Path, served: bool) -> None:
    full = thinpool("send", source, "mon").stdout
    thinpool("receive", target, "m", stdin=full)
    thinpool("snapshot", source, "disk", "wed", "--read-only")
    if served:
        for pool in (source, target):
            thinpool("serve", pool, "--detach")
    refused = thinpool("send", source, "wed", "-i", "never", code=ExitCode.NOT_FOUND)
    assert b"'tue', 'mon'" in refused.stderr
    wednesday = thinpool("send", source, "wed", "-i", "tue").stdout
    refused = thinpool("receive", target, "wed", stdin=wednesday, code=ExitCode.CONFLICT)
    assert b"both sides have is 'mon' ('m' here)" in refused.stderr
    listed = thinpool("list", target, "--json").stdout
    increment = thinpool("send", source, "wed", "--common", "-", stdin=listed).stdout
    before = (
        {path.name: path.stat().st_mtime_ns for path in target.iterdir() if path.is_file()}
        if not served
        else {}
    )
    said = thinpool("receive", "-n", target, "wed", stdin=increment).stdout.decode()
    assert "would receive 'wed' of 64 MiB (increment on 'm')" in said
    told = json.loads(thinpool("receive", "-n", target, "wed", "--json", stdin=increment).stdout)
    assert (told["dry_run"], told["base"], told["hole_bytes"]) == (True, "m", 4 * MIB)
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    assert names(target) == {"m"}
    thinpool("receive", target, "wed", stdin=increment)
    estimate = thinpool("send", source, "wed", "--common", "-", "-n", stdin=listed).stdout
    assert b"increment on 'mon'" in estimate
    half = listed.replace(b'"receiving": false', b'"receiving": true')
    thinpool("send", source, "wed", "--common", "-", stdin=half, code=ExitCode.CONFLICT)
    thinpool("send", source, "wed", "--common", "-", stdin=b"{}", code=ExitCode.USAGE)
    none = thinpool("send", source, "wed", "--common", "-", stdin=b'{"devices": []}', code=ExitCode.CONFLICT)
    assert b"no snapshot related to 'wed' is in both pools" in none.stderr
