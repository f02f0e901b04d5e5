"""Making a pool, and opening one: locks, checks of both files, names reconciled with the metadata.

The checks are ordered so that nothing is changed before everything was found to fit, and opening costs the same
however many mappings there are: no full check is needed after a crash, because the committed state is intact.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from metadata import (
    BlockDamaged,
    CountDamaged,
    FileStore,
    MetadataError,
    NotPoolMetadata,
    PoolMetadata,
    ShortRead,
    format_pool,
)

from .catalog import Catalog
from .data_file import DataFile
from .description import METADATA_BLOCK_BYTES
from .engine import Engine, kept_metadata
from .errors import (
    BadSize,
    NotAPool,
    OpeningFailed,
    PoolDamaged,
    PoolExists,
    PoolNotFound,
    RecoveryFailed,
    RecoveryLost,
)
from .mapping_journal import Entry, MappingJournal, Witness, announce_replay, forget_journal, left_behind
from .metadata_margin import MetadataMargin
from .pool import Pool
from .pool_location import PoolLocation
from .pool_lock import PoolLock
from .reconciling import reconcile, take_names
from .replay import EntriesUnfitError, replay

SECTOR_BYTES = 512
BLOCK_BYTES_STEP = 64 << 10  # dm-thin: data blocks are 64 KiB to 1 GiB, in steps of 64 KiB
BLOCK_BYTES_MAX = 1 << 30
METADATA_BLOCKS_MIN = 512
METADATA_BLOCKS_DEFAULT_MIN = 16384
METADATA_BLOCKS_MAX = 255 * 16320  # drivers/md/dm-thin-metadata.h, THIN_METADATA_MAX_SECTORS
# Failures that say nothing about a file: the next try may go well.
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})

log = logging.getLogger("thinpool")


def default_metadata_bytes(data_blocks: int) -> int:
    """Four times LVM's 64 bytes a data block: the file is sparse, and running out is what hurts people."""
    blocks = max(data_blocks * 256 // METADATA_BLOCK_BYTES, METADATA_BLOCKS_DEFAULT_MIN)
    return min(blocks, METADATA_BLOCKS_MAX) * METADATA_BLOCK_BYTES


def create_pool(
    directory: Path,
    *,
    size_bytes: int,
    block_bytes: int = BLOCK_BYTES_STEP,
    metadata_bytes: int | None = None,
) -> None:
    """Make a pool directory, complete or not at all. Sizes are rounded up to whole blocks.

    Raises BadSize, PoolExists, OSError.
    """
    if not BLOCK_BYTES_STEP <= block_bytes <= BLOCK_BYTES_MAX or block_bytes % BLOCK_BYTES_STEP:
        raise BadSize(str(block_bytes), "a data block is 64 KiB to 1 GiB, in multiples of 64 KiB")
    if size_bytes <= 0:
        raise BadSize(str(size_bytes), "a pool has at least one data block")
    data_blocks = -(-size_bytes // block_bytes)
    if metadata_bytes is None:
        metadata_bytes = default_metadata_bytes(data_blocks)
    metadata_blocks = metadata_bytes // METADATA_BLOCK_BYTES
    if not METADATA_BLOCKS_MIN <= metadata_blocks <= METADATA_BLOCKS_MAX:
        raise BadSize(str(metadata_bytes), "metadata is 2 MiB to 15.875 GiB")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PoolExists(str(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there in one step: a kill leaves no half-made pool under the name.
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_files(building, data_blocks * block_bytes, metadata_blocks, block_bytes)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync_directory(directory.parent)


def _write_files(building: Path, data_bytes: int, metadata_blocks: int, block_bytes: int) -> None:
    location = PoolLocation.directory(building)
    for path, length in (
        (location.metadata_path, metadata_blocks * METADATA_BLOCK_BYTES),
        (location.data_path, data_bytes),
    ):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, length)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    store = FileStore(location.metadata_path, writable=True)
    try:
        format_pool(
            store, data_block_sectors=block_bytes // SECTOR_BYTES, data_blocks=data_bytes // block_bytes
        )
    finally:
        store.close()
    assert location.catalog_path is not None
    Catalog.create(location.catalog_path).close()
    _sync_directory(building)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_pool(location: PoolLocation, *, read_only: bool = False) -> Pool:
    """Open a pool for this process alone (shared with other readers when `read_only`).

    A pool that is marked `needs_check` opens read-only. Raises PoolNotFound, PoolBusy, NotAPool, PoolDamaged,
    DataFileMissing, DataFileTooShort, CatalogDamaged, CatalogFailed, OpeningFailed, RecoveryFailed, RecoveryLost.
    Refusing changes nothing: the same opening works when the cause is gone (after RecoveryLost without what it names).
    """
    if not location.metadata_path.exists():
        raise PoolNotFound(str(location))
    lock = PoolLock.acquire(location, shared=read_only)
    try:
        return _open_locked(location, lock, read_only)
    except BaseException:
        lock.close()
        raise


def _open_locked(location: PoolLocation, lock: PoolLock, read_only: bool) -> Pool:
    try:
        return _opened(location, lock, read_only)
    except MetadataError as error:
        raise PoolDamaged(str(location.metadata_path), str(error)) from error
    except OSError as error:
        if error.filename is not None or error.errno in PASSING:
            raise  # it says itself what it is about
        raise OpeningFailed(str(location), error.strerror or str(error)) from error


def _opened(location: PoolLocation, lock: PoolLock, read_only: bool) -> Pool:
    with ExitStack() as undoing:
        entries = _entries_left(location)
        metadata = _open_metadata(location, read_only, in_memory=bool(entries))
        undoing.callback(metadata.close)
        writable = not read_only and not metadata.needs_check
        data = DataFile(
            location.data_path,
            block_bytes=metadata.data_block_sectors * SECTOR_BYTES,
            blocks=0 if location.metadata_only and read_only else metadata.data_blocks,
            writable=writable,
        )
        undoing.callback(data.close)
        if entries and not metadata.needs_check:
            _replay(location, metadata, data, entries)
        catalog = _open_catalog(location, writable=writable)
        undoing.callback(catalog.close)
        catalog.recover(metadata.transaction_id)
        if location.names_path is not None:
            take_names(catalog, metadata, location.names_path, data.block_bytes)
        reconcile(catalog, metadata, data.block_bytes)
        margin = MetadataMargin(location.metadata_path, metadata, log.warning) if writable else None
        if margin is not None:
            undoing.callback(margin.close)
            # Before the journal begins, which believes in the metadata file as it is then.
            margin.keep(kept_metadata(metadata))
        journal = _begin_journal(location) if writable else None
        if journal is not None:
            undoing.callback(journal.close)
        engine = Engine(metadata, data, writable=writable, log=log.error, journal=journal, margin=margin)
        undoing.callback(engine.committer.stop)
        pool = Pool(location, engine, catalog, [lock])
        if writable:
            pool.metadata_readers.release_left_over()
            pool.lazy.sweep()
            pool.transfers.drop_frozen_copies()
        undoing.pop_all()
    return pool


def _entries_left(location: PoolLocation) -> list[Entry]:
    """What a killed process had answered and not committed."""
    path = location.journal_path
    try:
        if path is None or not path.stat().st_size:
            return []
        with closing(Witness(location.metadata_path, location.data_path)) as witness:
            return left_behind(path, witness) if witness.usable else []
    except FileNotFoundError:
        return []  # what is missing is told by whoever opens it for use
    except OSError as error:
        if error.errno in PASSING:
            raise  # what a killed server had answered must not be dropped for that
        raise RecoveryFailed(str(path), error.strerror or str(error)) from error


def _replay(location: PoolLocation, metadata: PoolMetadata, data: DataFile, entries: list[Entry]) -> None:
    """Put entries into the metadata, and commit where that may be written; otherwise they are in memory only."""
    path = location.journal_path
    assert path is not None

    def flush() -> None:
        try:
            data.flush()
        except OSError as error:
            # A flush that succeeds at the second try proves nothing: there must be no second replay.
            try:
                forget_journal(path)
            except OSError as second:
                log.error(  # noqa: TRY400
                    "%s could not be emptied, delete it before the pool is opened again: %s", path, second
                )
            raise RecoveryLost(str(location.data_path), error.strerror or str(error)) from error

    def commit() -> None:
        if data.writable:
            metadata.commit(flush)

    try:
        if data.writable:
            announce_replay(path)
        replay(metadata, entries, commit)
        commit()
    except (OSError, BlockDamaged, CountDamaged, ShortRead) as error:
        # All that a commit writes is written anew by the next: the journal stays for it.
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise RecoveryFailed(str(path), reason) from error
    except (EntriesUnfitError, MetadataError) as error:
        metadata.abort()
        log.warning("the journal of a killed server does not fit the pool and is left out: %s", error)
    else:
        log.info("the last server was killed: %d changes it had answered are recovered", len(entries))


def _begin_journal(location: PoolLocation) -> MappingJournal | None:
    """The journal of a pool that is open for writing; None for a pool that has no place for it."""
    if location.journal_path is None:
        return None
    try:
        with ExitStack() as undoing:
            witness = Witness(location.metadata_path, location.data_path)
            undoing.callback(witness.close)
            if witness.usable:
                journal = MappingJournal.begin(location.journal_path, witness, log.warning)
                undoing.pop_all()
                return journal
    except OSError as error:
        if error.errno in PASSING:
            raise
        log.warning("writes that are not flushed will not outlive a killed server: %s", error)
    return None


def _open_metadata(location: PoolLocation, read_only: bool, *, in_memory: bool) -> PoolMetadata:
    """`in_memory`: it may be changed in memory although it is never written."""
    path = location.metadata_path
    if not path.is_file() and not path.is_block_device():
        raise NotAPool(str(location), "its metadata is not a file")
    store = FileStore(path, writable=not read_only)
    try:
        return PoolMetadata.open(store, writable=not read_only or in_memory)
    except NotPoolMetadata as error:
        store.close()
        raise NotAPool(str(path), str(error)) from error
    except MetadataError as error:
        store.close()
        raise PoolDamaged(str(path), str(error)) from error
    except BaseException:
        store.close()
        raise


def _open_catalog(location: PoolLocation, *, writable: bool) -> Catalog:
    """The names; where nothing may change, a copy in memory that is recovered and reconciled all the same."""
    if location.catalog_path is None:
        return Catalog.create(":memory:")
    if not location.catalog_path.exists():
        log.warning("%s has no catalogue; devices are named after their ids", location)
        return Catalog.create(location.catalog_path if writable else ":memory:")
    return Catalog.open(location.catalog_path, writable=writable)
