"""Stores: exact reads, whole blocks, short files and read-only files."""

from __future__ import annotations

import pytest

from metadata import FileStore, MemoryStore, OutOfRange, ReadOnlyMetadata, ShortRead


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryStore(4)
    path = tmp_path / "metadata"
    path.write_bytes(bytes(4 * 4096))
    return FileStore(path, writable=True)


def test_write_and_read_back(store):
    store.write(1, b"a" * 4096 + b"b" * 4096)
    store.flush()
    assert store.read(0, 4) == bytes(4096) + b"a" * 4096 + b"b" * 4096 + bytes(4096)
    assert store.size_blocks() == 4
    store.close()


def test_reading_past_the_end(store):
    with pytest.raises(ShortRead) as caught:
        store.read(3, 2)
    assert caught.value.received_bytes == 4096


def test_only_whole_blocks(store):
    with pytest.raises(ValueError, match="100"):
        store.write(0, b"x" * 100)


def test_partial_last_block_does_not_count(tmp_path):
    path = tmp_path / "metadata"
    path.write_bytes(bytes(4096 + 100))
    assert FileStore(path, writable=False).size_blocks() == 1


def test_read_only_file(tmp_path):
    path = tmp_path / "metadata"
    path.write_bytes(bytes(4096))
    store = FileStore(path, writable=False)
    with pytest.raises(ReadOnlyMetadata):
        store.write(0, bytes(4096))
    store.close()
    store.close()


def test_memory_store_has_an_end():
    store = MemoryStore(2)
    with pytest.raises(OutOfRange):
        store.write(1, bytes(8192))
    store.resize(3)
    store.write(1, bytes(8192))
    store.resize(1)
    assert store.size_blocks() == 1
