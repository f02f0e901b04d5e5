"""The engine under the names: one metadata, one data file, the open devices, and the transaction between them.

Locks, always taken in this order, so that no two threads can wait for each other:

1. `transaction`: one changer of the metadata at a time; a commit holds it from beginning to end.
2. a session's own lock, held while that connection applies a batch of reads and writes. A session holding it
   never asks for `transaction`; a snapshot holds `transaction` and takes the locks of all of a device's sessions.
3. a device's `lock`: its block map and its list of mappings not yet in the tree.
4. `tree`: the metadata in memory, held briefly. While the blocks of a commit are being written only
   `transaction` is held, so look-ups go on.

Why a commit is safe at any instant of a power cut: the lists of new mappings are taken first, then the data file
is flushed, then the tree's blocks are written and flushed, then the superblock, then that is flushed. A new
mapping is put on its list only after what it must show (the copy of the old block, or the zeros of a fresh one)
was written, so whatever the superblock can reach was durable before it.
"""

from __future__ import annotations

import errno
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from metadata import (
    BlockDamaged,
    CommitReport,
    CountDamaged,
    MetadataError,
    PoolMetadata,
    ShortRead,
    Superblock,
)

from .committer import Committer
from .data_file import DataFile
from .device import ThinDevice
from .errors import PoolPoisoned, PoolReadOnly
from .free_map import FreeMap, anonymous_memory
from .full_pool import ALL_PROMISED, NO_DATA, NO_JOURNAL, FullPool, NoFreeBlock
from .mapping_journal import MappingJournal
from .metadata_margin import MetadataMargin
from .reclaim import UNPINNED, Reclaimer
from .reservations import Reservations

COUNTS_PIECE = 1 << 14
ZERO_VIEW_BYTES = 64 << 20
# Metadata blocks that inserting into one chunk (512 blocks) may take at most: eight leaves and what is above them
# shadowed, three overflow nodes for each of these that was shared, and the new leaves.
CHUNK_COST_BLOCKS = 48
# Left alone beyond what the metadata keeps for itself: paths of the top level and overflow nodes of one insertion.
METADATA_SPARE_BLOCKS = 28
READ_ONLY_REASON = "it was opened read-only, or needs a check first"

Log = Callable[[str], None]


def nothing_more() -> None:
    """The `last_change` of most commits."""


def kept_metadata(metadata: PoolMetadata) -> int:
    """Free metadata blocks that new mappings leave alone, so that commits, deletions and rollbacks find them."""
    bitmaps = -(-metadata.data_blocks // 16320)
    return metadata.metadata_reserve + metadata.metadata_kept + bitmaps + METADATA_SPARE_BLOCKS


class Engine:
    """A pool without names. Device ids and bytes in, bytes out."""

    def __init__(
        self,
        metadata: PoolMetadata,
        data: DataFile,
        *,
        writable: bool,
        log: Log,
        journal: MappingJournal | None = None,
        margin: MetadataMargin | None = None,
    ) -> None:
        if writable:
            # numpy imports this when `unique` is called first. In the middle of a commit that may fail for lack of file
            # descriptors, and would cost the pool.
            importlib.import_module("numpy.ma")
        self.metadata = metadata
        self.data = data
        self.writable = writable
        self.block_bytes = data.block_bytes
        self.time = metadata.time
        # Replies for unmapped ranges are slices of this: reading it maps the kernel's zero page.
        self.zeros = memoryview(anonymous_memory(ZERO_VIEW_BYTES))
        self.transaction = threading.RLock()
        self.tree = threading.RLock()
        self.devices: dict[int, ThinDevice] = {}
        self.failure: Exception | None = None
        self.failed_for_good = False  # not even `needs_check` could be written
        # What the metadata in memory is after giving up: unknown, where the committed state could not be read again;
        # else that of the commit which failed, where its superblock is the one in the file all the same.
        self.tree_unknown = False
        self.failed_commit_counts = False
        self._attempted: Superblock | None = None  # of the commit that is going on
        self.free = FreeMap(metadata.unavailable_data(), self._scrub)
        self.reclaimer = Reclaimer(data, self.free, log)
        self.reservations = Reservations(self)
        self.committer = Committer(self.commit_if_dirty, self.reclaim)
        self.journal = journal
        self.margin = margin
        if margin is not None and journal is not None:
            margin.before_change = journal.about_to_lengthen
        # Asked for more space when all is taken, and told after commits that changed how full the pool is.
        self.more_space: Callable[[], bool] = lambda: False
        self.level_changed: Callable[[], None] = lambda: None
        self.full = FullPool(log, data.disk_free_bytes)
        self._log = log
        self._room_lock = threading.Lock()
        self._room_blocks = self._room()

    # --- opening and closing ---

    def open_device(self, device_id: int, size_bytes: int, *, read_only: bool) -> ThinDevice:
        """The one object of a device; every session on it shares it."""
        with self.transaction:
            device = self.devices.get(device_id)
            if device is None:
                device = ThinDevice(self, device_id, size_bytes, read_only=read_only)
                self.devices[device_id] = device
            return device

    def close(self) -> None:
        """Commit and let go. The caller has ended the sessions."""
        self.committer.stop()
        try:
            if self.writable and self.failure is None:
                with self.transaction:
                    self.commit()
                self.reclaim()
                if self.journal is not None:
                    self.journal.discard()
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Close the files and do nothing else: what is not committed stays in the journal, as after a kill."""
        self.committer.stop()
        if self.journal is not None:
            self.journal.close()
        if self.margin is not None:
            self.margin.close()
        self.data.close()
        self.metadata.close()

    # --- the transaction ---

    def require_writable(self) -> None:
        """Raise PoolReadOnly or PoolPoisoned where nothing may change."""
        if self.failure is not None:
            raise PoolPoisoned(str(self.failure))
        if not self.writable:
            raise PoolReadOnly(READ_ONLY_REASON)

    @contextmanager
    def changing_tree(self) -> Iterator[None]:
        """Around one change of the metadata in memory. `transaction` is held.

        What it refuses it has not begun; but where a block could not be read half of a change may be done, and
        such a transaction must never be committed: the pool is poisoned. So after an interrupt (Ctrl-C), which may come
        anywhere, but that says nothing against the pool.
        """
        with self.tree:
            try:
                yield
            except (OSError, MemoryError, BlockDamaged, CountDamaged, ShortRead) as error:
                self.poison(error)
                raise
            except (KeyboardInterrupt, SystemExit):
                self.abandon()
                raise

    def collect(self) -> None:
        """Put the new mappings of all open devices into the tree. `transaction` is held."""
        for device in self.devices.values():
            device.apply_pending()

    @contextmanager
    def looking_at_tree(self) -> Iterator[PoolMetadata]:
        """Around look-ups in the metadata. Raises OSError(EIO) where half a change may be in memory for good."""
        with self.tree:
            if self.tree_unknown:
                raise OSError(
                    errno.EIO, "the committed metadata could not be read again after a failed commit"
                )
            yield self.metadata

    def commit_if_dirty(self) -> None:
        """What a FLUSH asks for: everything replied to so far becomes durable."""
        with self.transaction:
            if self.failure is not None:
                raise PoolPoisoned(str(self.failure))
            if self.writable:
                self.commit()

    def commit(self, last_change: Callable[[], None] = nothing_more) -> CommitReport | None:
        """Commit the transaction in the contract's order; `transaction` is held.

        `last_change` may change the metadata in memory when the list of mappings is closed: nothing else comes after
        it in this transaction. None when only data had to be flushed. Any failure poisons the pool: the state on disk
        is the last committed one, and a flush that failed once is never asked again as though it had not.
        """
        try:
            report = self._commit(last_change)
        except Exception as error:
            self.poison(error)
            raise
        except BaseException:
            self.abandon()
            raise
        self._attempted = None
        return report

    def _commit(self, last_change: Callable[[], None]) -> CommitReport | None:
        if last_change is nothing_more and self._only_data():
            self.data.flush()
            return None
        journal = self.journal
        if journal is not None:
            # Before anything is taken: what comes later is entered as not committed, and may be all the same.
            journal.cut()
        report = self._commit_cut(last_change)
        if journal is not None:
            journal.committed()
        return report

    def _only_data(self) -> bool:
        """Whether no mapping was made or dropped. A write that has its block and no entry yet has a fresh one."""
        if self.free.has_fresh or self.metadata.dirty:
            return False
        return not any(device.pending for device in self.devices.values())

    def _commit_cut(self, last_change: Callable[[], None]) -> CommitReport | None:
        # Taken before the lists of mappings: a block handed out in between is looked at by the next commit.
        fresh = self.free.take_fresh()
        self.collect()
        self.data.flush()
        with self.tree:
            last_change()
        report = None
        if self.metadata.dirty:
            with self.tree:
                prepared = self.metadata.prepare_commit()
            if self.journal is not None and prepared.superblock is not None:
                self.journal.about_to_commit(prepared.superblock.pack())
            self._attempted = prepared.superblock
            self.metadata.write_commit(prepared)
            with self.tree:
                report = self.metadata.finish_commit(prepared)
        if report is None and not len(fresh):
            return None  # nothing but data: what the next mapping may take has not changed either
        orphans = self._unreferenced(fresh)
        freed = orphans if report is None else np.union1d(report.freed_data, orphans)
        self.reclaimer.add(freed)
        self.reservations.changed()
        self._find_room()
        self.tell_space()
        self.level_changed()
        return report

    def _unreferenced(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Of blocks handed out since the last commit, those no mapping came to use (or kept)."""
        unused: list[NDArray[np.uint64]] = []
        with self.tree:
            for piece in np.unique(blocks // np.uint64(COUNTS_PIECE)).tolist():
                first = piece * COUNTS_PIECE
                count = min(COUNTS_PIECE, self.metadata.data_blocks - first)
                counts = self.metadata.data_counts(first, count)
                inside = blocks[(blocks >= first) & (blocks < first + count)]
                unused.append(inside[counts[inside - np.uint64(first)] == 0])
        return np.concatenate(unused) if unused else blocks

    def poison(self, error: Exception) -> None:
        """After a failed commit: nothing changes any more, and the next opener is told (`needs_check`)."""
        if self.failure is not None:
            return
        self._log(f"the pool is read-only from now on, a commit failed: {error}")
        self.give_up(error)
        if self.journal is not None:
            self.journal.discard()
        try:
            with self.tree:
                self.tree_unknown = True
                self.metadata.abort()
                self.tree_unknown = False
                # A flush that failed says nothing of what was written: names follow what the next opener finds.
                self.failed_commit_counts = self.metadata.superblock == self._attempted
                self.metadata.set_needs_check(True)
                self.metadata.commit()
        except (OSError, MetadataError) as second:
            self.failed_for_good = True
            self._log(f"needs_check could not be recorded: {second}")

    def abandon(self) -> None:
        """After an interrupt in the middle of a change: go on as though the process had been killed there.

        Closing commits nothing then, and what had been answered before is left to the next opener, in the journal.
        """
        if self.failure is None:
            self.tree_unknown = True
            self.give_up(InterruptedError(errno.EINTR, "a change was interrupted"))

    def give_up(self, error: Exception) -> None:
        """Refuse every further change, because of `error`; what is on disk is in order."""
        self.failure = error
        for device in list(self.devices.values()):
            device.refuse_writes()

    # --- space ---

    def oldest_pin(self) -> int:
        """The smallest epoch any session has pinned."""
        pins = [session.pinned for device in list(self.devices.values()) for session in list(device.sessions)]
        return min(pins, default=UNPINNED)

    def reclaim(self) -> int:
        """Hand back freed blocks that no reader can see any more; none after the pool gave up."""
        if self.failure is not None:
            return 0
        returned = self.reclaimer.run(self.oldest_pin)
        if returned:
            self.tell_space()
        return returned

    def tell_space(self) -> None:
        """After blocks or metadata became free: wake the writes that wait for it."""
        if self._has_space():
            self.full.space_came()
        elif self.free.promised and self.free.free_blocks:
            self.full.wake()  # what is promised to a device is for that device to find

    def take_block(self, device_id: int) -> int:
        """A free data block for a device, that reads as zeros (or, where the file cannot punch, anything).

        Raises OSError: ENOSPC when there is none, EIO when poisoned. Metadata to map it was set aside before.
        """
        if self.failure is not None:
            raise OSError(errno.EIO, "the pool is read-only after a failed commit")
        if self.journal is not None and self.journal.full:
            raise NoFreeBlock(NO_JOURNAL)
        block = self.free.allocate(self.reservations.of(device_id))
        if block < 0:
            raise NoFreeBlock(ALL_PROMISED if self.free.free_blocks else NO_DATA)
        return block

    def _room(self) -> int:
        """Metadata blocks that new mappings may take, so that the commit that inserts them cannot run out."""
        metadata = self.metadata
        kept = kept_metadata(metadata)
        if self.margin is not None:
            self.margin.keep(kept)
        return metadata.metadata_blocks_usable - kept

    def _find_room(self) -> None:
        """Replace the estimate by the truth, less what is set aside for mappings that are not in the tree yet."""
        with self.tree:
            room = self._room()
        with self._room_lock:
            charged = sum(len(device.charged) for device in self.devices.values())
            self._room_blocks = room - charged * CHUNK_COST_BLOCKS

    def charge_metadata(self, charged: set[int], chunk: int) -> bool:
        """Set metadata aside for inserting into a chunk, and note it in `charged`. A device's lock is held.

        False where there is not enough.
        """
        with self._room_lock:
            if chunk not in charged:
                if self._room_blocks < CHUNK_COST_BLOCKS:
                    return False
                charged.add(chunk)
                self._room_blocks -= CHUNK_COST_BLOCKS
            return True

    @property
    def metadata_is_small(self) -> bool:
        """Whether there is no room for more mappings although the file system would have some: it is all in use."""
        return not self.can_map and not (self.margin is not None and self.margin.lacking)

    @property
    def can_map(self) -> bool:
        """Whether the metadata has room for more mappings."""
        return self._room_blocks >= CHUNK_COST_BLOCKS

    def give_back(self) -> bool:
        """See that the file system has got back all that was freed. False where nothing may change."""
        with self.transaction:
            if self.failure is not None or not self.writable:
                return False
            if self.metadata.dirty or self.reclaimer.waiting_blocks:
                self.commit()
        self.reclaim()
        return True

    def make_space(self, device_id: int | None = None) -> bool:
        """See whether there is a free block for a device, and metadata to map it, after all.

        First the estimate of the metadata is replaced by the truth, then what was freed is committed and handed
        back, then it is counted what is promised to others, then the pool may grow by itself. Called with no session
        lock held and nothing pinned by the caller.
        """
        with self.transaction:
            if self.failure is not None or not self.writable:
                return False
            self.collect()
            if self.margin is not None and not self.can_map:
                self.margin.widen()
            self._find_room()
        if self._has_space(device_id):
            return True
        self.commit_if_dirty()
        self.reclaim()
        if not self._has_space(device_id):
            with self.transaction:
                self.reservations.measure()
        return self._has_space(device_id) or (self.more_space() and self._has_space(device_id))

    def _has_space(self, device_id: int | None = None) -> bool:
        journal_full = self.journal is not None and self.journal.full
        claim = None if device_id is None else self.reservations.of(device_id)
        return self.free.available_blocks(claim) > 0 and self.can_map and not journal_full

    def _scrub(self, first: int, count: int) -> None:
        offset, length = first * self.block_bytes, count * self.block_bytes
        if self.data.has_data(offset, length):
            self.data.punch(offset, length)

    # --- growing ---

    def grow_data(self, blocks: int) -> None:
        """Add data blocks; sessions see the larger map before the first new block is handed out."""
        with self.transaction:
            self.require_writable()
            self.data.grow(blocks)
            with self.changing_tree():
                self.metadata.grow_data(blocks)
            self.commit()
            for device in list(self.devices.values()):
                with device.quiet():
                    device.rebind()
            self.free.grow(blocks)
            self.tell_space()

    def forget(self, device_id: int) -> None:
        """Drop the object of a device that is gone, and let the others look again who shares with whom."""
        self.devices.pop(device_id, None)
        self.reservations.changed(much=True)
        for device in self.devices.values():
            device.sharing_changed()
