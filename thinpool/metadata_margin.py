"""Space for the metadata of a pool, taken from the file system before a transaction needs it.

In: which part of the metadata file is real, keeping some of it free ahead of use. Out: how much a transaction may need
(`metadata/pool_state.py`), what is refused when there is no more (`engine.py`, `full_pool.py`).

Theory of operation. The metadata file is sparse, so a write to a block that was never written may meet a full file
system. In a commit that is too late: what it was to make durable has been answered, and the pool would have to give up.
So the blocks of a prefix of the file are allocated with fallocate(2), and transactions take none behind it
(`PoolMetadata.limit`). New blocks are taken from low numbers up and freed ones again, so the prefix follows the use.
It is made longer when less than half of the margin is left after a commit, or when an operation asks for more; a
commit itself never needs it, and costs no system call while there is enough.

Where the file system has no more, there is no room for new mappings: writes that need one wait or fail as the policy
says, as in a pool whose metadata are full. Commits, deletions and discards go on in what was taken before, and the next
try that succeeds lets the rest go on.

fallocate(2) changes the time of the file, by which a journal is believed (`mapping_journal.py`): `before_change` is
called first. On a full disk xfs refuses it even where everything is there already, as it reserves what it is asked
for; so after a refusal the file is asked what it has. File systems (and block devices) that cannot allocate ahead are
used as they are. Copy-on-write ones may still need space to overwrite; for them this is no promise.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

from metadata import BLOCK_BYTES, PoolMetadata

from .allocated import allocated_up_to
from .data_file import UNSUPPORTED, fallocate

# Free blocks ahead of use: 4 MiB at first, twice as many whenever a write had to wait for more.
MARGIN_BLOCKS = 1024
MARGIN_BLOCKS_MAX = 1 << 17
# Of what the file system has free, no more than this part is taken ahead, beyond the smallest margin.
DISK_SHARE = 16
# After a refusal the rest is taken in pieces of this many blocks, as far as it goes.
PIECE_BLOCKS = 64

Log = Callable[[str], None]


class MetadataMargin:
    """The space of one pool's metadata file. The engine's transaction is held around every call."""

    def __init__(self, path: Path, metadata: PoolMetadata, log: Log) -> None:
        """Raises OSError. The descriptor is our own: a commit that wants more must not have to open one."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Also where a pool is dropped unclosed.
        self._let_go = weakref.finalize(self, os.close, self._descriptor)
        self._metadata = metadata
        self._log = log
        self._secured = 0
        self._target = MARGIN_BLOCKS
        self.before_change: Callable[[], None] = lambda: None
        self.lacking = False  # the file system refused the last try
        self.supported = stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def close(self) -> None:
        """Let go of the file; what was allocated stays so. Idempotent."""
        self._let_go()

    def _allocate(self, first: int, count: int) -> None:
        """Make blocks real. Raises OSError."""
        fallocate(self._descriptor, 0, first * BLOCK_BYTES, count * BLOCK_BYTES)

    def keep(self, kept_blocks: int) -> None:
        """See that beyond `kept_blocks`, which commits and deletions may need, there is half a margin at least."""
        if not self.supported or self._secured >= self._metadata.metadata_blocks:
            return
        if not self._secured or self._metadata.metadata_blocks_usable < kept_blocks + self._target // 2:
            self._secure(kept_blocks + self._target)

    def widen(self) -> None:
        """A write had to wait because the margin was used up between two commits: keep more from now on."""
        disk = os.fstatvfs(self._descriptor)
        share = disk.f_bavail * disk.f_frsize // BLOCK_BYTES // DISK_SHARE
        self._target = max(min(2 * self._target, MARGIN_BLOCKS_MAX, share), self._target)

    def _more_room(self, free_blocks: int) -> None:
        """An operation needs so many usable blocks."""
        if self.supported:
            self._secure(free_blocks + self._target // 2)

    def _secure(self, free_blocks: int) -> None:
        wanted = self._metadata.end_of_free(free_blocks)
        if wanted > self._secured:
            self.before_change()
            try:
                self._advance(wanted)
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    self.supported = False
                elif not self.lacking:
                    self.lacking = True
                    self._log(f"no space can be set aside for metadata: {error.strerror}")
            else:
                self.lacking = False
        else:
            self.lacking = False
        self._metadata.limit(self._secured if self.supported else None, self._more_room)

    def _advance(self, wanted: int) -> None:
        try:
            self._allocate(self._secured, wanted - self._secured)
            self._secured = wanted
        except OSError as error:
            if error.errno in UNSUPPORTED:
                raise
            while self._secured < wanted:
                present = allocated_up_to(self._descriptor, self._secured * BLOCK_BYTES) // BLOCK_BYTES
                self._secured = min(max(present, self._secured), wanted)
                count = min(PIECE_BLOCKS, wanted - self._secured)
                if count:
                    self._allocate(self._secured, count)
                    self._secured += count
