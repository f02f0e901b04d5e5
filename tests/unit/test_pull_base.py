"""Pulling on top of what the pool has: what is fetched, what is refused, what a kill leaves."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.pulled_pools import (
    MIB,
    complete,
    entry_of,
    is_equal,
    mapped_blocks,
    opening_one,
)
from tests.fakes.store_source import FakeDevice, FakeSnapshot
from thinpool.catalog import Catalog
from thinpool.errors import BaseNotStored, NoSuchDevice
from thinpool.lazy_devices import PullRequest
from thinpool.pool import Pool
from thinpool.remote_blocks import RemoteBlocks
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

pytest.importorskip("obstore", reason="needs the package obstore")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    with opening_one(tmp_path / "pool") as open_one:
        yield open_one


def days(url: str) -> tuple[FakeSnapshot, FakeSnapshot]:
    """Monday and Tuesday of one device: blocks changed, discarded, new; zeros where there were none, and more of it."""
    store = Store.open(url, create=True)
    device = FakeDevice(130 * MIB + 4096)
    for block in (*range(40), *range(1020, 1030), 2080):
        device.write(block, secrets.token_bytes(24))
    monday = device.snapshot()
    Push(store, monday, "monday", KnownChunks(None)).run()
    for block in (3, 17, 1025, 1500):
        device.write(block, secrets.token_bytes(24))
    device.write(20, b"\0")
    device.discard(5)
    tuesday = device.snapshot()
    Push(store, tuesday, "tuesday", KnownChunks(None)).run()
    return monday, tuesday


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("block_bytes", [CHUNK_BYTES, 3 * CHUNK_BYTES, MIB])
def test_a_pull_fetches_only_what_its_base_does_not_have(
    url: str, open_one: Callable[..., Pool], block_bytes: int, lazily: bool
) -> None:
    monday, tuesday = days(url)
    pool = open_one(block_bytes)
    pool.begin_pull(PullRequest(url, "monday", "here", read_only=True))
    complete(pool, "here")
    changed = {block * CHUNK_BYTES // block_bytes for block in (3, 5, 17, 20, 1025, 1500)}
    pool.begin_pull(PullRequest(url, "tuesday", "next", lazy=lazily, read_only=True, base="here"))
    lazy = pool.lazy.of(entry_of(pool, "next"))
    assert lazy is not None
    assert lazy.remote_blocks == len(changed)
    pool = reopened(pool, open_one, block_bytes)
    if lazily:
        assert is_equal(pool.open_session(entry_of(pool, "next")), tuesday)
    complete(pool, "next")
    assert is_equal(pool.open_session(entry_of(pool, "next")), tuesday)
    assert is_equal(pool.open_session(entry_of(pool, "here")), monday)
    expected = {chunk * CHUNK_BYTES // block_bytes for chunk in tuesday.mapped_chunks()}
    assert mapped_blocks(pool, "next") == expected
    assert entry_of(pool, "next").content_id == tuesday.identity
    assert pool.info("next").exclusive_bytes == len(changed & expected) * block_bytes
    assert not any(entry.receiving for entry in pool.catalog.entries())


def reopened(pool: Pool, open_one: Callable[..., Pool], block_bytes: int) -> Pool:
    pool.close()
    return open_one(block_bytes)


def test_what_is_no_base_is_refused_and_nothing_changes(url: str, open_one: Callable[..., Pool]) -> None:
    days(url)
    pool = open_one()
    pool.create_device("other", MIB)
    pool.create_snapshot("other", "frozen", read_only=True)
    pool.begin_pull(PullRequest(url, "monday", "here"))
    complete(pool, "here")
    session = pool.open_session(entry_of(pool, "here"))
    session.enter()
    session.write(0, memoryview(b"x"))
    session.leave()
    session.sent()
    for base, error in (
        ("none", NoSuchDevice),
        ("frozen", BaseNotStored),
        ("here", BaseNotStored),
    ):
        with pytest.raises(error):
            pool.begin_pull(PullRequest(url, "tuesday", "next", base=base))
    assert {entry.name for entry in pool.catalog.entries()} == {"other", "frozen", "here"}
    assert not list(Store.open(url).held())


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("at", ["trimmed", "listed"])
def test_a_pull_on_a_base_that_is_killed_before_it_has_a_name_begins_again(
    url: str, open_one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, at: str, aborted: bool
) -> None:
    """What it left is hidden, is dropped by the next, and is no list that anybody reads."""
    _, tuesday = days(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "monday", "here", read_only=True))
    complete(pool, "here")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if at == "trimmed":
        monkeypatch.setattr(RemoteBlocks, "create", killed)
    else:
        monkeypatch.setattr(Catalog, "apply", killed)
    with pytest.raises(KeyboardInterrupt):
        pool.begin_pull(PullRequest(url, "tuesday", "next", base="here", read_only=True))
    monkeypatch.undo()
    pool = reopened(pool, open_one, CHUNK_BYTES)
    assert pool.catalog.by_name("next") is None
    if aborted:
        pool.abort_pull("next")
        with pytest.raises(NoSuchDevice):
            pool.abort_pull("next")
    pool.begin_pull(PullRequest(url, "tuesday", "next", base="here", read_only=True))
    complete(pool, "next")
    assert is_equal(pool.open_session(entry_of(pool, "next")), tuesday)
    assert {entry.name for entry in pool.catalog.entries()} == {"here", "next"}
