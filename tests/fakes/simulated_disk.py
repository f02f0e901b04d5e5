"""A simulated disk under a whole pool: metadata, data and catalogue, every change recorded in one order.

Which faults it may suffer, and why recovery must work all the same:

* **Metadata blocks** may be lost, torn at 512-byte sectors and reordered until a flush of the metadata returns.
  Recovery works because a committed superblock never names a block written after the flush before it, and nothing
  that a committed superblock names is ever overwritten.
* **The superblock** may be lost or old after the cut, torn like everything else. All that ever changes in it lies in
  its first sector, so it is the old one or the new one.
* **Data sectors** may be lost, torn and reordered until a flush of the data returns, holes punched included.
  Recovery works because data is flushed before the metadata that names it, and a block the committed metadata
  names is never given to anybody else.
* **File lengths** change with the next flush of that file.
* **The catalogue** is SQLite's business: its transactions are taken to be atomic and durable when they return. A
  cut falls before one or after it, never inside (tests/crash kills real processes inside them).
* **The journal** is left by a power cut as it was at that instant, the most tempting it can be, and the machine has
  booted since. Recovery works because entries of another boot are not looked at. A kill of the process alone leaves
  the same boot, and everything as it was written.
* **Small files** beside them (which blocks of a device are still in an object store) are cut call by call: a sector is
  durable with its file's flush, a name with its directory's (`simulated_files`). The object store itself is elsewhere
  and loses nothing (`simulated_objects`).
* **Any operation** can fail or come out short, by `before`: a hook that is asked before each one. A failed flush
  leaves what it should have covered in doubt for ever, which is what Linux does.

The engine above is the real one. The data file is a memfd, so replies are still sent from a memory map.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from metadata import BLOCK_BYTES, ShortRead, format_pool
from tests.fakes.disk_history import SECTOR_BYTES, Contents, Event, File, FileImage, Image, Kind
from tests.fakes.simulated_files import IN_PLACE_OF_OS, SimulatedFiles
from tests.fakes.simulated_objects import SimulatedObjects
from thinpool import opening
from thinpool.catalog import MEMORY, Catalog
from thinpool.data_file import DataFile
from thinpool.mapping_journal import MappingJournal, Witness
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK_SECTORS = BLOCK_BYTES // SECTOR_BYTES
# What `before` is told: "metadata read", "data write", ... It may raise OSError, or return how many bytes to do.
Before = Callable[[str, int], int]
JOURNAL_ENTRIES = 64
BOOTS = itertools.count()


class SimulatedLocation(PoolLocation):
    """Two files without a directory, and a catalogue and a journal all the same."""

    journal = -1

    @property
    def has_catalog(self) -> bool:
        return True

    @property
    def catalog_path(self) -> Path:
        return Path("/dev/null")  # something that exists

    @property
    def journal_path(self) -> Path:
        return self.metadata_path.with_name(f"{self.journal}")

    def __str__(self) -> str:
        return "simulated pool"


class SimulatedDisk:
    """Files in memory, and the history of what happened to them.

    `image` is where history begins; None makes an empty disk of the given sizes, all zeros.
    """

    def __init__(
        self,
        contents: Contents,
        image: Image | None = None,
        *,
        metadata_blocks: int = 0,
        catalogs: type[SimulatedCatalog] | None = None,
    ) -> None:
        self.contents = contents
        self.catalogs = catalogs or SimulatedCatalog
        self.events: list[Event] = []
        self.before: Before | None = None
        # Held from changing a file to recording what it holds now; never while `before` is asked.
        self.changing = threading.RLock()
        self.punches = True  # False: a file system without holes, or a block device
        if image is None:
            sectors = metadata_blocks * BLOCK_SECTORS
            empty = FileImage(np.zeros(sectors, np.int32), sectors), FileImage(np.zeros(0, np.int32), 0)
            image = Image(empty, None)
        self.start = image
        self.catalog_state = image.catalog
        self.metadata = self._make("metadata", image.metadata)
        self.data = self._make("data", image.data)
        self.journal = os.memfd_create("journal", os.MFD_CLOEXEC)
        os.pwrite(self.journal, image.journal, 0)
        self.boot = f"boot {next(BOOTS)}"
        self.before_journal: Before | None = None
        self.small = SimulatedFiles(self, image.small)
        self.objects = SimulatedObjects(self, image.store)
        self.location = type("Location", (SimulatedLocation,), {"journal": self.journal})(
            Path(f"/proc/self/fd/{self.metadata}"), Path(f"/proc/self/fd/{self.data}"), self.small.root
        )
        IN_PLACE_OF_OS.add(self.small)

    def _make(self, name: str, image: FileImage) -> int:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, image.sectors * SECTOR_BYTES)
        used = np.flatnonzero(image.contents[: image.sectors])
        if len(used):
            for run in np.split(used, np.flatnonzero(np.diff(used) != 1) + 1):
                first, end = int(run[0]), int(run[-1]) + 1
                content = self.contents.bytes_of(image.contents[first:end])
                os.pwrite(descriptor, content, first * SECTOR_BYTES)
        return descriptor

    @classmethod
    def nowhere(cls) -> SimulatedDisk:
        """A disk without files, for a catalogue whose changes are of no interest."""
        disk = cls.__new__(cls)
        disk.events, disk.before, disk.catalog_state = [], None, None
        return disk

    def close(self) -> None:
        """Free the memory."""
        os.close(self.metadata)
        os.close(self.data)
        os.close(self.journal)
        IN_PLACE_OF_OS.remove(self.small)

    # --- recording ---

    def ask(self, operation: str, count: int = 0) -> int:
        """Let the hook see, fail or shorten an operation; returns how many bytes to do."""
        return count if self.before is None else self.before(operation, count)

    def wrote(self, file: File, offset: int, length: int) -> None:
        """Record that bytes changed: the sectors they lie in, as they are now."""
        descriptor = self.metadata if file is File.METADATA else self.data
        first, end = offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES)
        now = os.pread(descriptor, (end - first) * SECTOR_BYTES, first * SECTOR_BYTES)
        now += bytes((end - first) * SECTOR_BYTES - len(now))
        self.events.append(Event(Kind.WRITE, file, first, self.contents.intern(now)))

    def flushed(self, file: File) -> None:
        self.events.append(Event(Kind.FLUSH, file))

    def resized(self, file: File, length: int) -> None:
        self.events.append(Event(Kind.SIZE, file, payload=length // SECTOR_BYTES))

    def mark(self, what: object) -> None:
        """Record something for the oracle."""
        self.events.append(Event(Kind.MARK, payload=what))

    def flush(self, file: File, operation: str) -> None:
        try:
            self.ask(operation)
        except OSError:
            self.events.append(Event(Kind.LOST_FLUSH, file))
            raise
        self.flushed(file)

    # --- the pool on it ---

    def format(self, *, data_blocks: int, block_bytes: int = 65536) -> None:
        """Make an empty pool, everything durable."""
        os.ftruncate(self.data, data_blocks * block_bytes)
        self.resized(File.DATA, data_blocks * block_bytes)
        self.flushed(File.DATA)
        store = SimulatedStore(self)
        format_pool(store, data_block_sectors=block_bytes // SECTOR_BYTES, data_blocks=data_blocks)
        self.catalogs.begin(self).close()

    def open(self, *, read_only: bool = False) -> Pool:
        """Open the pool with the real opening code; the periodic commit never starts."""
        SimulatedObjects.in_use = self.objects
        with self._in_place():
            location: object = self.location
            pool = opening._open_locked(location, _NoLock(), read_only)  # type: ignore[arg-type]
        pool.override_settings({"metadata-autogrow-limit": "off", "min-free-metadata": "off"})
        pool.engine.full.configure("error", 0)  # one thread: nobody could make space for a write that waits
        pool.engine.committer.start = lambda: None  # type: ignore[method-assign]
        pool._lengthen_metadata = self._lengthen_metadata  # type: ignore[method-assign]
        return pool

    def _lengthen_metadata(self, length_bytes: int) -> None:
        self.ask("metadata grow")
        os.ftruncate(self.metadata, length_bytes)
        self.resized(File.METADATA, length_bytes)
        self.flushed(File.METADATA)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """The simulated files in place of the real ones, while the pool is being opened."""

        def data_file(_path: Path, *, block_bytes: int, blocks: int, writable: bool) -> SimulatedData:
            return SimulatedData(self, block_bytes=block_bytes, blocks=blocks, writable=writable)

        with mock.patch.multiple(
            opening,
            FileStore=lambda _path, *, writable: SimulatedStore(self, writable=writable),
            DataFile=data_file,
            Catalog=SimulatedCatalogs(self),
            MappingJournal=SimulatedJournals(self),
            Witness=type("Booted", (Witness,), {"_boot": staticmethod(lambda: self.boot)}),
            left_behind=self._asked("journal read", opening.left_behind),
            announce_replay=self._asked("journal write", opening.announce_replay),
        ):
            yield

    def _asked(self, operation: str, do: Callable[..., object]) -> Callable[..., object]:
        """The same after `before_journal` was asked; such an operation is done wholly or not at all."""

        def asking(*arguments: object) -> object:
            if self.before_journal is not None:
                self.before_journal(operation, 0)
            return do(*arguments)

        return asking


class _NoLock:
    def close(self) -> None:
        pass


class SimulatedJournals:
    """Stands in for the `MappingJournal` class while a pool is being opened: small, and recorded."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk

    def begin(self, path: Path, witness: Witness, log: Callable[[str], None]) -> MappingJournal:
        disk = self._disk

        def pwrite(data: bytes, offset: int) -> int:
            if disk.before_journal is not None:
                data = data[: disk.before_journal("journal write", len(data))]
            done = os.pwrite(disk.journal, data, offset)
            content = os.pread(disk.journal, 1 << 16, 0)
            disk.events.append(Event(Kind.JOURNAL, payload=content))
            return done

        return MappingJournal.begin(path, witness, log, entries_max=JOURNAL_ENTRIES, pwrite=pwrite)


class SimulatedStore:
    """The metadata file as `metadata.BlockStore`."""

    def __init__(self, disk: SimulatedDisk, *, writable: bool = True) -> None:
        self._disk = disk
        self._writable = writable

    def read(self, first: int, count: int) -> bytes:
        wanted = self._disk.ask("metadata read", count * BLOCK_BYTES)
        data = os.pread(self._disk.metadata, wanted, first * BLOCK_BYTES)
        if len(data) < count * BLOCK_BYTES:
            raise ShortRead(first, count, len(data))
        return data

    def write(self, first: int, data: bytes) -> None:
        assert self._writable
        allowed = self._disk.ask("metadata write", len(data))
        with self._disk.changing:
            os.pwrite(self._disk.metadata, data[:allowed], first * BLOCK_BYTES)
            self._disk.wrote(File.METADATA, first * BLOCK_BYTES, allowed)
        if allowed < len(data):  # as FileStore does: the rest is another system call
            self._disk.ask("metadata write", len(data) - allowed)
            os.pwrite(self._disk.metadata, data[allowed:], first * BLOCK_BYTES + allowed)
            self._disk.wrote(File.METADATA, first * BLOCK_BYTES + allowed, len(data) - allowed)

    def flush(self) -> None:
        self._disk.flush(File.METADATA, "metadata flush")

    def size_blocks(self) -> int:
        return os.fstat(self._disk.metadata).st_size // BLOCK_BYTES

    def close(self) -> None:
        pass


class SimulatedData(DataFile):
    """The data file: everything that changes it is recorded, copies go through reads and writes."""

    def __init__(self, disk: SimulatedDisk, *, block_bytes: int, blocks: int, writable: bool) -> None:
        super().__init__(disk.location.data_path, block_bytes=block_bytes, blocks=blocks, writable=writable)
        self._disk = disk
        self._copies = False
        self.punches = writable and disk.punches
        self.zeroes_range = False
        self.pwrite = self._pwrite

    def _pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        allowed = self._disk.ask("data write", len(data))
        with self._disk.changing:
            done = os.pwrite(self.descriptor, memoryview(data)[:allowed], offset)
            self._disk.wrote(File.DATA, offset, done)
        return done

    def read(self, offset: int, length_bytes: int) -> bytearray:
        if self._disk.ask("data read", length_bytes) < length_bytes:
            length_bytes_left = self._disk.ask("data read", length_bytes)  # the second half of a short read
            assert length_bytes_left >= 0
        return super().read(offset, length_bytes)

    def punch(self, offset: int, length_bytes: int) -> bool:
        if self.punches:
            self._disk.ask("data punch", length_bytes)
        with self._disk.changing:
            done = super().punch(offset, length_bytes)
            if done:
                self._disk.wrote(File.DATA, offset, length_bytes)
        return done

    def grow(self, blocks: int) -> None:
        before = self.size_bytes()
        self._disk.ask("data grow")
        super().grow(blocks)
        if self.size_bytes() != before:
            self._disk.resized(File.DATA, self.size_bytes())
            self._disk.flushed(File.DATA)  # DataFile.grow does it itself

    def flush(self) -> None:
        self._disk.flush(File.DATA, "data flush")


class SimulatedCatalog(Catalog):
    """The real catalogue over SQLite in memory; after each transaction its rows are the durable state."""

    disk: SimulatedDisk

    @classmethod
    def begin(cls, disk: SimulatedDisk) -> SimulatedCatalog:
        """An empty catalogue, durable."""
        catalog = cls.create(MEMORY)
        assert isinstance(catalog, SimulatedCatalog)
        catalog.disk = disk
        catalog._record()
        return catalog

    @classmethod
    def restore(cls, disk: SimulatedDisk, state: object) -> SimulatedCatalog:
        """The catalogue as its durable state says."""
        catalog = cls.create(MEMORY)
        assert isinstance(catalog, SimulatedCatalog)
        assert isinstance(state, tuple)
        catalog.disk = disk
        connection = catalog._connection
        connection.execute("BEGIN")
        for table, rows in zip(("device", "staged", "setting"), state, strict=True):
            for row in rows:
                connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        connection.execute("COMMIT")
        catalog._load()
        return catalog

    def _state(self) -> object:
        return tuple(
            tuple(self._connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall())
            for table in ("device", "staged", "setting")
        )

    def _record(self) -> None:
        self.disk.catalog_state = self._state()
        self.disk.events.append(Event(Kind.CATALOG, payload=self.disk.catalog_state))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with super()._transaction():
            yield
            # Refused before COMMIT, as SQLite does it: the transaction is then rolled back.
            with self._failing():
                self.disk.ask("catalogue")
        self._record()


class SimulatedCatalogs:
    """Stands in for the `Catalog` class while a pool is being opened."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk

    def open(self, _path: Path, *, writable: bool = True) -> Catalog:
        catalog = self._disk.catalogs.restore(self._disk, self._disk.catalog_state)
        if not writable:
            catalog.disk = SimulatedDisk.nowhere()
        return catalog

    def create(self, path: Path | str) -> Catalog:
        raise AssertionError(path)
