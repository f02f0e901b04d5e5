"""Streams that are cut, flipped, reordered or put together anew: refused, and the target unchanged or resumable.

Whole streams, increments and the rests of resumed ones, packed and unpacked. What sound streams do is in
`test_send_receive.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.fakes.transfer_pools import (
    allocation,
    boundaries,
    content,
    picture,
    records,
    stream_of,
    take_in,
    token_of,
    two_days,
)
from thinpool.errors import PartlyReceived, ResumeMismatch, StreamDamaged, StreamUnsupported, ThinPoolError
from thinpool.pool import Pool
from thinpool.stream_format import HEADER_BYTES, OPTIONAL, PREAMBLE_BYTES, RecordHeader

PACKED = pytest.mark.parametrize("level", [0, 1])
BASE = pytest.mark.parametrize(("name", "base"), [("mon", None), ("tue", "mon")])


def cuts(stream: bytes) -> list[int]:
    """Every border of a record, a byte before it, inside of its header, and inside of the preamble."""
    places = boundaries(stream)
    found = {*places[:-1], *(place + 7 for place in places[:-1]), *(place - 1 for place in places), 0, 3}
    return sorted(found)


def flips(stream: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    """The stream with one bit flipped: anywhere, in each header, in the preamble."""
    places = [chance.randrange(len(stream) * 8) for _ in range(count)]
    places += [
        (start + chance.randrange(HEADER_BYTES)) * 8 + chance.randrange(8)
        for start in boundaries(stream)[:-1]
    ]
    places += [chance.randrange(PREAMBLE_BYTES * 8) for _ in range(5)]
    for place in places:
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def sent(source: Pool, target: Pool, name: str, base: str | None, level: int) -> bytes:
    """A stream of `name`, and its base in the target."""
    two_days(source)
    if base is not None:
        take_in(target, stream_of(source, base), base)
    return stream_of(source, name, base, level=level)


@PACKED
@BASE
def test_every_cut_is_refused_and_changes_nothing(
    source: Pool, target: Pool, name: str, base: str | None, level: int
) -> None:
    stream = sent(source, target, name, base, level)
    before = picture(target)
    for cut in cuts(stream):
        with pytest.raises(StreamDamaged):
            take_in(target, stream[:cut], name)
        assert picture(target) == before, cut
    take_in(target, stream, name)
    assert content(target, name) == content(source, name)


@PACKED
@BASE
def test_flipped_bits_are_refused_and_change_nothing(
    source: Pool, target: Pool, name: str, base: str | None, level: int
) -> None:
    stream = sent(source, target, name, base, level)
    before = picture(target)
    for damaged in flips(stream, random.Random(11), 30):
        with pytest.raises((StreamDamaged, StreamUnsupported)):
            take_in(target, damaged, name)
    assert picture(target) == before


def test_every_cut_can_be_resumed(source: Pool, target: Pool):
    two_days(source)
    take_in(target, stream_of(source, "mon"), "mon")
    stream = stream_of(source, "tue", "mon")
    wanted = content(source, "tue"), allocation(source, "tue")
    places = boundaries(stream)
    for number, cut in enumerate([*places[1:-1], *(place + HEADER_BYTES // 2 for place in places[1:-1])]):
        name = f"t{number}"
        with pytest.raises(StreamDamaged):
            take_in(target, stream[:cut], name, resumable=True)
        assert target.catalog.by_name(name) is None
        token = token_of(target)
        with (
            pytest.raises((PartlyReceived, ResumeMismatch))
            if cut > places[2]
            else pytest.raises(ThinPoolError)
        ):
            take_in(target, stream_of(source, "mon"), name)
        take_in(target, stream_of(source, token=token), name)
        assert (content(target, name), allocation(target, name)) == wanted
    assert not [info for info in target.devices() if info.receiving]


def half(source: Pool, target: Pool, whole: bytes, name: str, level: int) -> bytes:
    """A half-received device, and the rest of its stream."""
    with pytest.raises(StreamDamaged):
        take_in(target, whole[: boundaries(whole)[3]], name, resumable=True)
    return stream_of(source, token=token_of(target), level=level)


@PACKED
@BASE
def test_every_cut_of_a_resumed_stream_can_be_resumed_again(
    source: Pool, target: Pool, name: str, base: str | None, level: int
) -> None:
    whole = sent(source, target, name, base, level)
    wanted = content(source, name), allocation(source, name)
    rest = half(source, target, whole, "t", level)
    target.transfers.abort("t")
    for cut in cuts(rest):
        assert half(source, target, whole, "t", level)[PREAMBLE_BYTES + HEADER_BYTES :]
        position = token_of(target)
        with pytest.raises(StreamDamaged):
            take_in(target, stream_of(source, token=position, level=level)[:cut], "t")
        assert target.catalog.by_name("t") is None
        take_in(target, stream_of(source, token=token_of(target), level=level), "t")
        assert (content(target, "t"), allocation(target, "t")) == wanted, cut
        target.delete("t")


@PACKED
@BASE
def test_flipped_bits_of_a_resumed_stream_do_not_get_in(
    source: Pool, target: Pool, name: str, base: str | None, level: int
) -> None:
    whole = sent(source, target, name, base, level)
    wanted = content(source, name), allocation(source, name)
    rest = half(source, target, whole, "t", level)
    for damaged in flips(rest, random.Random(12), 12):
        with pytest.raises((StreamDamaged, StreamUnsupported)):
            take_in(target, damaged, "t")
        assert target.catalog.by_name("t") is None
        take_in(target, stream_of(source, token=token_of(target), level=level), "t")
        assert (content(target, "t"), allocation(target, "t")) == wanted
        target.delete("t")
        half(source, target, whole, "t", level)


def test_records_that_change_places_go_missing_or_come_twice(source: Pool, target: Pool):
    two_days(source)
    stream = stream_of(source, "mon")
    head, parts = stream[:PREAMBLE_BYTES], records(stream)
    before = picture(target)
    chance = random.Random(3)
    for _ in range(20):
        changed = list(parts)
        first, second = chance.sample(range(len(parts)), 2)
        match chance.randrange(3):
            case 0:
                changed[first], changed[second] = changed[second], changed[first]
            case 1:
                del changed[first]
            case _:
                changed.insert(second, parts[first])
        with pytest.raises(StreamDamaged):
            take_in(target, head + b"".join(changed), "mon")
    for more in (b"x", stream):
        with pytest.raises(StreamDamaged):
            take_in(target, stream + more, "mon")
    assert picture(target) == before


def renumbered(stream: bytes, parts: list[bytes]) -> bytes:
    """Records with numbers and checksums made right again, the last one left as it was."""
    made = []
    for number, part in enumerate(parts):
        header, payload = RecordHeader.decode(part[:HEADER_BYTES]), part[HEADER_BYTES:]
        made.append(replace(header, number=number).encode(payload) + payload)
    return stream[:PREAMBLE_BYTES] + b"".join(made)


def test_a_stream_put_together_anew_fails_by_its_whole(source: Pool, target: Pool):
    """Checksums of records can be made right by anybody; the whole is not, and then no part of it is kept."""
    two_days(source)
    stream = stream_of(source, "mon")
    parts = records(stream)
    before = picture(target)
    with pytest.raises(StreamDamaged):
        take_in(target, renumbered(stream, parts[:2] + parts[3:]), "mon", resumable=True)
    assert picture(target) == before


def test_unknown_records_are_skipped_where_they_may_be(source: Pool, target: Pool):
    two_days(source)
    stream = stream_of(source, "mon")
    parts = records(stream)
    for kind, error in ((5, StreamUnsupported), (OPTIONAL | 5, StreamDamaged)):
        extra = RecordHeader(kind, 0, 0, 0, 0, 0).encode(b"new") + b"new"
        with pytest.raises(error, match="kind 5" if error is StreamUnsupported else "SHA-256"):
            take_in(target, renumbered(stream, [parts[0], extra, *parts[1:]]), "mon")


def test_later_versions_are_told_from_damage(source: Pool, target: Pool):
    from metadata.checksum import crc32c

    two_days(source)
    stream = bytearray(stream_of(source, "mon"))
    stream[12:14] = b"\0\2"
    stream[16:20] = crc32c(stream[:16]).to_bytes(4, "big")
    with pytest.raises(StreamUnsupported, match="version 2"):
        take_in(target, bytes(stream), "mon")
