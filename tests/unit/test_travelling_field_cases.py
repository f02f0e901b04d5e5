"""Field cases of resizes and of snapshots that travel: those no other test holds, and the table in docs/send-receive.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadata import FileStore, recount
from tests.fakes.transfer_pools import BLOCK, allocation, new_pool, session_on, stream_of, take_in, write
from tests.unit.test_field_case_table import ROW
from tests.unit.test_nbd_checklist import existing
from thinpool.common_bases import nearest, related
from thinpool.pool import Pool

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "send-receive.md"
# Classes F and J: odd numbers.
CASES = [f"B{number}" for first, last in ((55, 65), (99, 123)) for number in range(first, last + 1, 2)]


def test_the_table_has_every_case_and_its_tests_exist() -> None:
    found = ROW.findall(DOCUMENT.read_text())
    assert [case for case, *_ in found] == CASES
    for case, _, tests, outcome in found:
        named = re.findall(r"`(test_[a-z0-9_]+)`", tests)
        assert bool(named) != outcome.startswith("not covered"), f"{case} has no test and does not say so"
        for name in named:
            assert name in existing(), f"{case} names {name}, which does not exist"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Pool]:
    with new_pool(tmp_path / "source") as pool:
        yield pool


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Pool]:
    with new_pool(tmp_path / "target") as pool:
        yield pool


@pytest.mark.parametrize("size_bytes", [(2 << 40) - 512, 2 << 40, 8 << 40, 1 << 53])
def test_both_ends_of_devices_beyond_32_bits(source: Pool, target: Pool, size_bytes: int) -> None:
    source.create_device("big", size_bytes)
    last = size_bytes - 512
    write(source, "big", 0, b"a" * 512)
    write(source, "big", last, b"z" * 512)
    source.create_snapshot("big", "one", read_only=True)
    with session_on(source, "big") as session:
        # Whole blocks of it: the last one may be cut by the end of the device.
        session.trim(last // BLOCK * BLOCK, size_bytes - last // BLOCK * BLOCK)
        assert session.read_bytes(last, 512) == bytes(512)
        assert session.read_bytes(0, 512) == b"a" * 512
    source.create_snapshot("big", "two", read_only=True)
    take_in(target, stream_of(source, "one"), "one")
    take_in(target, stream_of(source, "two", "one"), "two")
    assert allocation(target, "one") == allocation(source, "one") == {0, last // BLOCK}
    assert allocation(target, "two") == allocation(source, "two") == {0}
    with session_on(target, "one") as session:
        assert session.read_bytes(last, 512) == b"z" * 512
    assert target.info("two").size_bytes == size_bytes


def test_a_device_that_grows_twenty_times_in_use_stays_sound(source: Pool) -> None:
    source.create_device("disk", 3 * BLOCK + 512)
    with session_on(source, "disk") as session:
        for number in range(20):
            size = source.info("disk").size_bytes
            session.enter()
            session.write(size - 512, memoryview(bytes([number + 1]) * 512))
            session.leave()
            session.sent()
            source.resize("disk", size + 3 * BLOCK + 512 * number)
            assert session.read_bytes(size - 512, 512) == bytes([number + 1]) * 512
            assert session.read_bytes(size, BLOCK) == bytes(BLOCK)
    source.commit()
    store = FileStore(source.location.metadata_path, writable=False)
    try:
        assert not recount(store)
    finally:
        store.close()


def test_bases_are_ordered_by_age_and_not_by_name(source: Pool) -> None:
    source.create_device("disk", 4 * BLOCK)
    for number in range(1, 13):
        write(source, "disk", 0, b"%d" % number)
        source.create_snapshot("disk", f"s{number}", read_only=True)
    entries = source.catalog.entries()
    newest = source.catalog.by_name("s12")
    assert newest is not None
    bases = related(newest, entries)
    assert [base.name for base in bases] == [f"s{number}" for number in range(11, 0, -1)]
    held = {entry.content_id for entry in entries if entry.name in ("s2", "s9", "s10")}
    found = nearest(bases, held)
    assert found is not None
    assert found.name == "s10"
