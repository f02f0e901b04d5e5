"""What the server needs from whoever owns the data: three protocols, implemented outside this package.

Offsets and lengths are bytes and have been validated against the export before any of these is called.
Failures are `OSError`s whose errno is translated into the protocol's set (see `errors.wire_errno`).
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Extents: TypeAlias = list[tuple[int, int]]

# Kinds of extents as `Session.extents` reports them.
EXTENT_HOLE = 0  # not allocated, reads as zeros
EXTENT_EXCLUSIVE = 1  # mapped, a write needs no new space
EXTENT_SHARED = 2  # mapped and shared with a snapshot: the first write needs a block


class Session(Protocol):
    """One connection on one export. All calls come from one thread at a time: the connection's own, or, for plain
    batches, the one that connections share.

    `read`, `read_copy` and `write` are called between `enter` and `leave`, everything else outside.
    """

    def enter(self) -> None:
        """Begin to apply a batch: take this connection's lock, pin what `read` will hand out."""

    def leave(self) -> None:
        """End the batch: drop the lock. What `read` handed out stays pinned."""

    def sent(self) -> None:
        """Unpin: no buffer handed out so far is in use any longer."""

    def held_up(self) -> bool:
        """Tell whether a batch begun now may have to wait for a lock held for long, or for a network. A hint.

        Such batches are applied in the connection's own thread.
        """

    def read(self, offset: int, length: int, parts: list[Buffer], /) -> int:
        """Append `memoryview`s that make up the range; return how many bytes of it are holes.

        The views may be slices of a file mapping: only the kernel may touch them (sendmsg, writev). Looking
        at one from Python could end the process with SIGBUS where the kernel merely reports EFAULT.
        """

    def read_copy(self, offset: int, length: int) -> bytearray:
        """Return the range in private memory (for TLS, and to learn the error behind an EFAULT)."""

    def write(self, offset: int, data: memoryview, /) -> None:
        """Apply a write or a piece of one. The view is valid during the call only."""

    def wait_for_space(self, refused: OSError, tries: int, /) -> bool:
        """After `write` failed with ENOSPC: try to free blocks; whether another try may succeed. Lock not held.

        `tries` counts how often this was asked about this piece before; at some time the answer is no.
        """

    def may_wait(self, refused: OSError, since: float, /) -> bool:
        """After that did not help either: whether the request waits for space, or is answered.

        `since` is when the request was refused first, on the monotonic clock. Asked again after every further try.
        """

    def space_descriptor(self) -> int:
        """Return a descriptor that is readable when what waits should be tried again, -1 where there is none."""

    def space_seen(self) -> None:
        """Make that descriptor unreadable until there is news; called before what waits is tried again."""

    def space_no_longer_wanted(self) -> None:
        """Nothing of this connection waits any more; the descriptor may go."""

    def flush(self) -> None:
        """Make durable everything that was replied to before on any connection of the export."""

    def trim(self, offset: int, length: int) -> None:
        """Unmap the range; it reads as zeros afterwards."""

    def zero(self, offset: int, length: int, *, keep_allocated: bool, fast_only: bool) -> None:
        """Make the range read as zeros. `fast_only` and not fast: OSError(ENOTSUP), at once, nothing changed."""

    def cache(self, offset: int, length: int) -> None:
        """Read ahead, as a hint."""

    def extents(self, offset: int, length: int) -> Extents:
        """Return consecutive (length, kind) pairs for the range or a non-empty prefix of it."""

    def dirty(self, context: str, offset: int, length: int) -> Extents:
        """Return consecutive (length, 0 or 1) pairs of a dirty context for the range or a non-empty prefix."""

    def close(self) -> None:
        """Release everything; called exactly once, also after failures."""


class Export(Protocol):
    """A named device as clients see it during negotiation. No method but `open` may touch data."""

    @property
    def name(self) -> str:
        """The canonical name."""

    @property
    def description(self) -> str:
        """One line for people, or an empty string."""

    @property
    def size_bytes(self) -> int:
        """The present size."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused with EPERM."""

    @property
    def preferred_block_bytes(self) -> int:
        """The unit that is cheapest to write."""

    def dirty_contexts(self) -> Sequence[str]:
        """Names <x> that are offered as `qemu:dirty-bitmap:<x>`."""

    def open(self) -> Session:
        """Start a session. Called once GO or EXPORT_NAME has been checked completely, never earlier."""


class ExportDirectory(Protocol):
    """All exports of a server."""

    def listing(self) -> Iterable[tuple[str, str]]:
        """Yield (name, description) of every export, cheaply: nothing is opened."""

    def find(self, name: str) -> Export | None:
        """Return the export of that name; the empty name means the default export."""
