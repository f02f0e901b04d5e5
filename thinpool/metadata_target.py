"""Where new metadata goes: a file or device that may be overwritten, a new file, or the metadata of an idle pool.

In: refusing what is in use or would be lost, sizes of new files, putting complete metadata in its place. Out: what is
written (`metadata.restore`, `metadata.repair`).

A regular file is never written in place: new metadata is made beside it, flushed, and renamed over it, so an
interrupted command leaves what was there. In a pool directory the file that was there is kept under another name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadata import (
    METADATA_BLOCKS_MAX,
    BuildReport,
    FileStore,
    Instead,
    MetadataError,
    MetadataFull,
    OutOfRange,
    RestoreInvalid,
    XmlInvalid,
    restore,
)
from metadata.superblock import read_superblock
from metadata.xml import ByteStream

from .errors import BadSize, DirectoryMissing, DumpUnusable, MetadataSpace, PoolBusy, TargetInUse
from .opening import METADATA_BLOCKS_MIN, default_metadata_bytes
from .operations import METADATA_BLOCK_BYTES
from .pool_location import PoolLocation
from .pool_lock import PoolLock

# The first element of a dump is in here, and with it the size of the data.
HEAD_BYTES = 1 << 16
_DATA_BLOCKS = re.compile(rb'nr_data_blocks\s*=\s*"([0-9]{1,15})"')


@dataclass(frozen=True, slots=True)
class MetadataTarget:
    """A place for new metadata. `size_bytes`: of a file that is made; None for as large as seems right."""

    location: PoolLocation
    force: bool = False
    size_bytes: int | None = None

    @property
    def path(self) -> Path:
        """The metadata file or device."""
        return self.location.metadata_path


@dataclass(frozen=True, slots=True)
class Made:
    """What was written: the builder's report, the size of the metadata, where the metadata before is kept."""

    report: BuildReport
    size_bytes: int
    kept: str | None

    def to_json(self) -> dict[str, Any]:
        """For programs; sizes in bytes."""
        return {
            "devices": self.report.devices,
            "mapped_blocks": self.report.mapped_blocks,
            "data_blocks_allocated": self.report.data_blocks_allocated,
            "metadata_bytes": self.size_bytes,
            "metadata_used_bytes": self.report.metadata_blocks_used * METADATA_BLOCK_BYTES,
            "kept": self.kept,
        }


def restore_into(stream: ByteStream, name: str, target: MetadataTarget, instead: Instead) -> Made:
    """Restore XML. `name` is the stream's, for messages; `instead` overrules the XML.

    Raises DumpUnusable, TargetInUse, PoolBusy, MetadataSpace, BadSize, OSError; the target is then what it was, unless
    it is a block device.
    """
    head = stream.read(HEAD_BYTES)
    found = _DATA_BLOCKS.search(head)
    blocks = instead.data_blocks if instead.data_blocks is not None else int(found[1]) if found else 0
    with open_target(target, default_metadata_bytes(max(blocks, 1))) as store:
        try:
            report = restore(_Joined(head, stream), store, instead)
        except (XmlInvalid, RestoreInvalid, OutOfRange) as error:
            raise DumpUnusable(name, str(error)) from error
        except MetadataFull as error:
            raise too_small(store) from error
        size_bytes = store.size_blocks() * METADATA_BLOCK_BYTES
    return Made(report, size_bytes, None if store.kept is None else str(store.kept))


def too_small(store: FileStore) -> MetadataSpace:
    """The error that says how large the target is, and that it is too small."""
    size_bytes = store.size_blocks() * METADATA_BLOCK_BYTES
    return MetadataSpace(size_bytes + METADATA_BLOCK_BYTES, size_bytes)


class TargetStore(FileStore):
    """The store that new metadata is written to. `kept`: where the metadata before went, once all is done."""

    kept: Path | None = None


class _Joined:
    """A stream of which the head was read already."""

    def __init__(self, head: bytes, stream: ByteStream) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """See `ByteStream.read`."""
        if self._head:
            part, self._head = self._head[:size], self._head[size:]
            return part
        return self._stream.read(size)


@contextmanager
def open_target(target: MetadataTarget, usual_bytes: int) -> Iterator[TargetStore]:
    """A store to make a pool in; in its place when the block ends, gone when it raises.

    `usual_bytes`: the size of a file that nobody gave a size for. Raises TargetInUse, PoolBusy, BadSize, OSError.
    """
    path = target.path
    if target.location.root is not None or path.exists():
        target.location.require()
        with _locked(target.location):
            if stat.S_ISBLK(path.stat().st_mode):
                with _device(target) as store:
                    yield store
            else:
                with _beside(target, max(usual_bytes, path.stat().st_size)) as store:
                    yield store
        return
    with _beside(target, usual_bytes) as store:
        yield store


@contextmanager
def _locked(location: PoolLocation) -> Iterator[None]:
    try:
        lock = PoolLock.acquire(location)
    except PoolBusy as busy:
        raise TargetInUse(str(location), f"is in use: {busy}") from busy
    try:
        yield
    finally:
        lock.close()


@contextmanager
def _device(target: MetadataTarget) -> Iterator[TargetStore]:
    _refuse_pool(target)
    store = TargetStore(target.path, writable=True)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _beside(target: MetadataTarget, size_bytes: int) -> Iterator[TargetStore]:
    """A new file beside the target, put in its place at the end."""
    in_pool = target.location.root is not None
    if not in_pool:
        _refuse_pool(target)
    blocks = (size_bytes if target.size_bytes is None else target.size_bytes) // METADATA_BLOCK_BYTES
    if not (1 if target.size_bytes is None else METADATA_BLOCKS_MIN) <= blocks <= METADATA_BLOCKS_MAX:
        raise BadSize(str(target.size_bytes or size_bytes), "metadata is 2 MiB to 15.875 GiB")
    path = target.path
    if not path.parent.is_dir():
        raise DirectoryMissing(str(path.parent))
    building = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    store: TargetStore | None = None
    try:
        os.ftruncate(descriptor, blocks * METADATA_BLOCK_BYTES)
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode & 0o777)
        store = TargetStore(building, writable=True)
        yield store
        os.fsync(descriptor)
        if in_pool:
            store.kept = _keep(path)
        building.rename(path)
        _sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            building.unlink()
        raise
    finally:
        os.close(descriptor)


def _keep(path: Path) -> Path:
    """A second name for a file, so that replacing it loses nothing."""
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.before-{number}")
        try:
            os.link(path, kept)
        except FileExistsError:
            number += 1
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            path.rename(kept)  # a file system without links
            return kept
        else:
            return kept


def _refuse_pool(target: MetadataTarget) -> None:
    """Raise TargetInUse where a pool would be overwritten without being asked."""
    if target.force or not target.path.exists():
        return
    store = FileStore(target.path, writable=False)
    try:
        read_superblock(store)
    except (MetadataError, OSError):
        return
    finally:
        store.close()
    raise TargetInUse(str(target.path), "holds a pool; --force overwrites it")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
