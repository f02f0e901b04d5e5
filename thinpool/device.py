"""A thin device that is open: its block map, its sessions, and what changes its mappings.

In: provisioning, breaking of sharing, unmapping, extents, taking a point in time. Out: the hot read and write
path (`session`), names and sizes on disk (`pool`), when to commit (`committer`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import TYPE_CHECKING

import numpy as np
from bitarray import bitarray

from metadata import MetadataError, MetadataFull

from .block_map import CHUNK_BLOCKS, MAPPED, TIME, UNMAPPED, BlockMap, Leaves, entry_of
from .delta import dirty_extents
from .extents import HOLE, ExtentList
from .free_map import zeroed_bits
from .full_pool import NO_METADATA, NoFreeBlock
from .session import Session

if TYPE_CHECKING:
    from .engine import Engine
    from .lazy_device import LazyDevice

UNMAP_SLICE_BLOCKS = 1 << 20
EXTENTS_MAX = 1 << 15
NOTHING = memoryview(b"")
COMPOSE_BYTES_MAX = 1 << 20


class ThinDevice:
    """One thin device of an engine, shared by all sessions on it.

    `shared_before` is the device's snapshotted time: a mapping with an older time may be shared with a snapshot
    and is copied before it is written.
    """

    def __init__(self, engine: Engine, device_id: int, size_bytes: int, *, read_only: bool) -> None:
        self.engine = engine
        self.device_id = device_id
        self.size_bytes = size_bytes
        self.read_only = read_only or not engine.writable
        self.block_bytes = engine.block_bytes
        self.lock = RLock()
        self.sessions: list[Session] = []
        self.pending: list[int] = []
        self.contexts: dict[
            str, int
        ] = {}  # dirty-bitmap context -> device id of the snapshot it compares with
        self.charged: set[int] = (
            set()
        )  # chunks whose insertion has metadata set aside; engine.charge_metadata
        self._sessions_lock = Lock()
        blocks = -(-size_bytes // self.block_bytes)
        self.block_map = BlockMap(blocks, self._load)
        self._judged: bitarray = zeroed_bits(-(-blocks // CHUNK_BLOCKS))
        with engine.looking_at_tree() as metadata:
            self.shared_before = metadata.device(device_id).snapshotted_time
        if engine.failure is not None:
            self.refuse_writes()

    # --- sessions ---

    def open(self, lazy: LazyDevice | None = None) -> Session:
        """A session for one connection; `lazy` where part of the content is still in a store."""
        with self._sessions_lock:
            session = Session(self) if lazy is None else _lazy_session(self, lazy)
            self.sessions.append(session)
        self.engine.committer.start()
        return session

    def drop(self, session: Session) -> None:
        """Forget a session that closed."""
        with self._sessions_lock:
            if session in self.sessions:
                self.sessions.remove(session)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold off every session between two batches; waits for writes being applied, never for a client."""
        with ExitStack() as held:
            held.enter_context(self._sessions_lock)
            for session in self.sessions:
                held.enter_context(session.lock)
            held.enter_context(self.lock)
            yield

    def rebind(self) -> None:
        """Let the sessions see a larger data file; inside `quiet`."""
        for session in self.sessions:
            session.rebind()

    def extend(self, size_bytes: int) -> bool:
        """Grow the open device. Sessions keep the size they were told. False where it must be reopened."""
        with self.lock:
            if not self.block_map.extend(-(-size_bytes // self.block_bytes)):
                return False
            self.size_bytes = size_bytes
            return True

    # --- loading ---

    def _load(self, begin: int, end: int) -> Leaves:
        try:
            with self.engine.looking_at_tree() as metadata:
                return list(metadata.mappings(self.device_id, begin, end))
        except MetadataError as error:
            raise OSError(errno.EIO, str(error)) from error

    def ensure(self, first: int, last: int) -> None:
        """Have the entries of blocks first..last (inclusive) in memory. Raises OSError(EIO) for damage."""
        with self.lock:
            self.block_map.ensure(first, last)

    # --- from the block map to the tree ---

    def apply_pending(self) -> None:
        """Insert the mappings made since the last time into the tree. The engine's transaction is held.

        Raises MetadataFull with the list as it was. Any other failure may have done half of it and poisons the pool.
        """
        # Under the lock even when the list is empty: a write that has its block and not yet its entry is waited
        # for, or the commit would take the block for one that nobody came to use.
        with self.lock:
            if not self.pending:
                self.charged.clear()
                self.engine.reservations.settle_nothing(self.device_id)
                return
            listed, self.pending = self.pending, []
            keys, values = self.block_map.mapped(np.unique(np.array(listed, dtype=np.uint64)))
            if len(keys):
                try:
                    with self.engine.changing_tree(), self.engine.reservations.settling(self.device_id):
                        self.engine.metadata.insert(self.device_id, keys, values)
                except MetadataFull:
                    self.pending = listed
                    raise
            self.charged.clear()

    def refuse_writes(self) -> None:
        """After a failed commit: every write fails, those to blocks that are ours already too."""
        # No time reaches this, so the hot path takes every block for a shared one and asks `provision`.
        self.shared_before = MAPPED

    def provision(self, index: int, inside: int, data: memoryview) -> int:
        """Make block `index` exclusively ours with `data` at `inside`; returns its entry.

        What the block must show is written before its entry is set, so neither a reader on another connection
        nor a commit ever sees a block that holds less. Raises OSError: ENOSPC when no block is free, EIO.
        """
        engine = self.engine
        with self.lock:
            entry = self._own(index)
            if entry:
                engine.data.write(((entry >> 24) - 1) * self.block_bytes + inside, data)
                return entry
            self._charge(index)
            block = engine.take_block(self.device_id)
            self._fill(block, self.block_map.entries[index], inside, data)
            return self._map(index, block)

    def claim_zeroed(self, index: int) -> int:
        """Make block `index` exclusively ours without its old content; returns its entry.

        A block that was ours already keeps its content: the caller zeroes it. Raises as `provision`.
        """
        with self.lock:
            entry = self._own(index)
            if entry:
                return entry
            self._charge(index)
            block = self.engine.take_block(self.device_id)
            self._fill(block, UNMAPPED, 0, NOTHING)
            return self._map(index, block)

    def _own(self, index: int) -> int:
        """The entry of a block that may be written in place, or 0. Raises OSError(EIO) in a poisoned pool."""
        if self.engine.failure is not None:
            raise OSError(errno.EIO, "the pool is read-only after a failed commit")
        entries = self.block_map.entries
        if not entries[index]:
            self.block_map.ensure(index, index)
        if entries[index] >= MAPPED and (entries[index] & TIME) < self.shared_before:
            self._judge_sharing(index)
        entry = entries[index]
        return entry if entry >= MAPPED and (entry & TIME) >= self.shared_before else 0

    def _map(self, index: int, block: int) -> int:
        journal = self.engine.journal
        if journal is not None:
            journal.mapped(self.device_id, index, block)
        entry = entry_of(block, self.engine.time)
        self.block_map.entries[index] = entry
        self.pending.append(index)
        self._charge(index)
        self.engine.committer.touch()
        return entry

    def _charge(self, index: int) -> None:
        """Set metadata aside for the mapping of a block, before anything is done for it. Raises OSError(ENOSPC)."""
        chunk = index // CHUNK_BLOCKS
        if chunk not in self.charged and not self.engine.charge_metadata(self.charged, chunk):
            raise NoFreeBlock(NO_METADATA)

    def _fill(self, block: int, old_entry: int, inside: int, data: memoryview) -> None:
        """Write the first content of a block: what was there before, overlaid with `data`."""
        file, length = self.engine.data, self.block_bytes
        at = block * length
        if len(data) < length:
            if old_entry >= MAPPED:
                source = ((old_entry >> 24) - 1) * length
                if length <= COMPOSE_BYTES_MAX:
                    # One read and one write: less work than a copy in the kernel and a write over it.
                    content = file.read(source, length)
                    content[inside : inside + len(data)] = data
                    file.write(at, content)
                    return
                file.copy(source, at, length)
            elif not file.punches:
                file.zero(at, length)  # a free block of such a file may hold anything
        if len(data):
            file.write(at + inside, data)

    def _judge_sharing(self, index: int) -> None:
        """Ask the reference counts about the blocks of one chunk whose times say "shared".

        Times err on one side: the other sharer may have been deleted or gone its own way. A mapping that turns
        out exclusive can become shared again only through a snapshot of this device, so its new time holds until
        then; "shared" may turn into "exclusive" later, which costs a copy and no more.

        The counts are those of the running transaction. Only while it has changed nothing are they the committed
        ones too: a sharer that let go a moment ago is back after a power cut, and must find its content.
        """
        chunk = index // CHUNK_BLOCKS
        if self._judged[chunk]:
            return
        doubtful = self.block_map.older_than(chunk, self.shared_before)
        try:
            with self.engine.tree:
                if self.engine.metadata.dirty:
                    return
                self._judged[chunk] = 1
                ours = doubtful[self.engine.metadata.exclusive(self.device_id, doubtful)]
        except MetadataError as error:
            raise OSError(errno.EIO, str(error)) from error
        if len(ours):
            self.block_map.restamp(ours, self.engine.time)
            # Where there is no room the new time is known to us only: it is found again when the pool is opened next.
            if self.engine.charge_metadata(self.charged, chunk):
                self.pending.extend(ours.tolist())

    def sharing_changed(self) -> None:
        """A device was deleted: what looked shared may be exclusive now."""
        with self.lock:
            self._judged.setall(0)

    def unmap(self, begin: int, end: int, *, with_the_step: bool = False) -> None:
        """Drop the mappings of blocks [begin, end). Blocks come back after the next commit.

        `with_the_step`: it is done together with a change of names and sizes or not at all, also where the process is
        killed or the commit fails. Nobody has the device open, and its object is dropped when the step is done. It is
        the first change in its transaction, where there is room for one removal: a commit in between would split the
        step. Raises MetadataFull all the same where the file system has no more.
        """
        engine = self.engine
        while begin < end:
            whole = with_the_step or end - begin <= 2 * UNMAP_SLICE_BLOCKS
            until = end if whole else begin + UNMAP_SLICE_BLOCKS
            with engine.transaction:
                engine.require_writable()
                journal = None if with_the_step else engine.journal
                if journal is not None and journal.full:
                    engine.commit()
                with self.lock:
                    # First into the tree: an entry that is unmapped here must not come back from there.
                    self.apply_pending()
                    if self._remove(begin, until, may_commit=not with_the_step) and journal is not None:
                        journal.dropped(self.device_id, begin, until)
                    if not with_the_step:
                        self.block_map.unmap(begin, until)
            begin = until
        engine.committer.touch()

    def _remove(self, begin: int, end: int, *, may_commit: bool) -> int:
        """Remove from the tree; returns how many mappings went."""
        engine = self.engine
        try:
            with engine.changing_tree(), engine.reservations.settling(self.device_id):
                return engine.metadata.remove(self.device_id, begin, end)
        except MetadataFull:
            if not may_commit:
                raise
            # Much was done in this transaction; in a new one there is room for a removal.
            engine.commit()
            with engine.changing_tree(), engine.reservations.settling(self.device_id):
                return engine.metadata.remove(self.device_id, begin, end)

    # --- looking ---

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length_bytes, kind) of consecutive ranges from `offset`, equal neighbours merged.

        Covers [offset, offset + length) or, when it is very fragmented, a prefix of it.
        """
        found = ExtentList(self.block_bytes, offset, offset + length, self.shared_before)
        begin, end = offset // self.block_bytes, -(-(offset + length) // self.block_bytes)
        with self.engine.transaction:
            for keys, values in self._leaves(begin, end):
                found.add(keys, values)
                if len(found.ranges) >= EXTENTS_MAX:
                    return found.ranges
        found.finish(HOLE)
        return found.ranges

    def _leaves(self, begin: int, end: int) -> Leaves:
        if self.engine.failure is not None:
            # What was answered and never committed is in the block map only, and reads back. Nothing changes it now.
            yield from self.block_map.leaves(begin, end)
            return
        if self.engine.writable:
            self.apply_pending()
        with self.engine.looking_at_tree() as metadata:
            yield from metadata.mappings(self.device_id, begin, end)

    def changed_since(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """(length_bytes, 1 changed or 0 same) from `offset` on, compared with the snapshot behind `context`.

        Covers [offset, offset + length) or a prefix of it. Raises OSError(EINVAL) where the snapshot is gone.
        """
        base = self.contexts.get(context)
        if base is None:
            raise OSError(errno.EINVAL, "the snapshot of this context does not exist any more")
        with self.engine.transaction:
            if self.engine.failure is not None and not self.read_only:
                raise OSError(
                    errno.EIO, "what changed and was not committed is not known after a failed commit"
                )
            if self.engine.writable and self.engine.failure is None:
                self.apply_pending()
            with self.engine.looking_at_tree() as metadata:
                return dirty_extents(metadata, (base, self.device_id), self.block_bytes, offset, length)

    def take_point_in_time(
        self, device_id: int, then: Callable[[], None] | None = None, *, replacing: bool = False
    ) -> None:
        """Make device `device_id` a snapshot of this one as it is now; the transaction is held.

        Every write that was acknowledged is in it: sessions are held off between batches, their new mappings go
        into the tree, and from the same instant on older mappings count as shared. `then` is called at that instant,
        before anything is changed, so that it may fail. `replacing`: another device is deleted in the same step.
        Raises ReservationNotCovered.
        """
        engine = self.engine
        engine.reservations.cover_sharing(self.device_id)
        with self.quiet():
            self.apply_pending()
            if then is not None:
                then()
            with engine.reservations.sharing(self.device_id), engine.changing_tree():
                engine.metadata.create_snapshot(device_id, self.device_id, replacing=replacing)
                engine.time = engine.metadata.time
                self.shared_before = engine.metadata.device(self.device_id).snapshotted_time
            self._judged.setall(0)


def _lazy_session(device: ThinDevice, lazy: LazyDevice) -> Session:
    from .lazy_session import LazySession

    return LazySession(device, lazy)
