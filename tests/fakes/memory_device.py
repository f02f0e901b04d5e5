"""A device in memory for NBD tests: thin (block map), with snapshots in name only and with faults on demand.

What it stands for: the engine's session, with the same locking protocol (calls outside `enter`/`leave` that
belong inside are failures, and the other way round). Which faults it can suffer: `fail` maps an operation
name to the OSError that its next calls raise, `slow` maps one to seconds. What it records: `log`, one tuple
per call, so tests can prove that an invalid request touched nothing.
"""

import errno
import mmap
import threading
import time
from collections.abc import Iterable, Sequence

BLOCK_BYTES = 65536
_ZEROS = memoryview(mmap.mmap(-1, 1 << 20))


class MemoryDevice:
    """Satisfies `nbd.device.Export`. All sessions share the data."""

    def __init__(
        self,
        name: str = "disk",
        size_bytes: int = 16 << 20,
        *,
        read_only: bool = False,
        description: str = "",
        dirty: dict[str, list[tuple[int, int]]] | None = None,
        preferred_block_bytes: int = BLOCK_BYTES,
        record: bool = True,
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.description = description
        self.preferred_block_bytes = preferred_block_bytes
        self.data = memoryview(mmap.mmap(-1, max(1, size_bytes)))
        self.kinds = bytearray((size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES)  # 0 hole, 1 exclusive, 2 shared
        self.dirty = dirty or {}
        self.log: list[tuple[object, ...]] | None = [] if record else None
        self.fail: dict[str, OSError] = {}
        self.slow: dict[str, float] = {}
        self.waits = False  # whether a write that fails with ENOSPC waits for space
        self.held_up = False  # whether batches had better not be applied in a shared thread
        self.sessions: list[MemorySession] = []
        self.lock = threading.Lock()
        self.open_error: OSError | None = None

    def dirty_contexts(self) -> Sequence[str]:
        return list(self.dirty)

    def open(self) -> "MemorySession":
        if self.open_error is not None:
            raise self.open_error
        session = MemorySession(self)
        self.sessions.append(session)
        return session

    @property
    def open_sessions(self) -> int:
        return sum(not session.closed for session in self.sessions)


class MemorySession:
    """Satisfies `nbd.device.Session`."""

    def __init__(self, device: MemoryDevice) -> None:
        self.device = device
        self.inside = False
        self.pinned = False
        self.closed = False

    def _note(self, operation: str, *details: object, inside: bool) -> None:
        device = self.device
        assert self.inside == inside, f"{operation} called {'outside' if inside else 'inside'} enter/leave"
        assert not self.closed
        if device.log is not None:
            device.log.append((operation, *details))
            if operation in device.slow:
                time.sleep(device.slow[operation])
            if operation in device.fail:
                raise device.fail[operation]

    def enter(self) -> None:
        self.inside = self.pinned = True

    def leave(self) -> None:
        self.inside = False

    def held_up(self) -> bool:
        return self.device.held_up

    def sent(self) -> None:
        self.pinned = False

    def read(self, offset: int, length: int, parts: list[bytes | bytearray | memoryview]) -> int:
        device = self.device
        if device.log is not None:
            self._note("read", offset, length, inside=True)
        holes, kinds, data = 0, device.kinds, device.data
        while length:
            block, within = divmod(offset, BLOCK_BYTES)
            count = min(BLOCK_BYTES - within, length)
            if kinds[block]:
                parts.append(data[offset : offset + count])
            else:
                parts.append(_ZEROS[:count])
                holes += count
            offset += count
            length -= count
        return holes

    def read_copy(self, offset: int, length: int) -> bytearray:
        self._note("read_copy", offset, length, inside=True)
        return bytearray(self.device.data[offset : offset + length])

    def write(self, offset: int, data: memoryview) -> None:
        device = self.device
        if device.log is not None:
            self._note("write", offset, len(data), inside=True)
        end = offset + len(data)
        device.data[offset:end] = data
        for block in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            device.kinds[block] = 1

    def wait_for_space(self, refused: OSError, tries: int) -> bool:
        return False

    def may_wait(self, refused: OSError, since: float) -> bool:
        return self.device.waits and refused.errno == errno.ENOSPC

    def space_descriptor(self) -> int:
        return -1

    def space_seen(self) -> None:
        pass

    def space_no_longer_wanted(self) -> None:
        pass

    def flush(self) -> None:
        self._note("flush", inside=False)

    def trim(self, offset: int, length: int) -> None:
        self._note("trim", offset, length, inside=False)
        self._clear(offset, length, keep=False)

    def zero(self, offset: int, length: int, *, keep_allocated: bool, fast_only: bool) -> None:
        self._note("zero", offset, length, keep_allocated, fast_only, inside=False)
        if fast_only and keep_allocated:
            raise OSError(errno.ENOTSUP, "not fast")
        self._clear(offset, length, keep=keep_allocated)

    def _clear(self, offset: int, length: int, *, keep: bool) -> None:
        device, end = self.device, offset + length
        with device.lock:
            at = offset
            while at < end:
                count = min(len(_ZEROS), end - at)
                device.data[at : at + count] = _ZEROS[:count]
                at += count
            if keep:
                blocks = range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)
                for block in blocks:
                    device.kinds[block] = device.kinds[block] or 1
            else:
                first, last = -(-offset // BLOCK_BYTES), end // BLOCK_BYTES
                if end == device.size_bytes:
                    last = len(device.kinds)
                if last > first:
                    device.kinds[first:last] = bytes(last - first)

    def cache(self, offset: int, length: int) -> None:
        self._note("cache", offset, length, inside=False)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._note("extents", offset, length, inside=False)
        out: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            block = offset // BLOCK_BYTES
            count = min((block + 1) * BLOCK_BYTES, end) - offset
            kind = self.device.kinds[block]
            if out and out[-1][1] == kind:
                out[-1] = (out[-1][0] + count, kind)
            else:
                out.append((count, kind))
            offset += count
        return out

    def dirty(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        self._note("dirty", context, offset, length, inside=False)
        out: list[tuple[int, int]] = []
        at, end = 0, offset + length
        for size, flag in self.device.dirty[context]:
            begin, stop = max(at, offset), min(at + size, end)
            if begin < stop:
                out.append((stop - begin, flag))
            at += size
        if at < end:
            out.append((end - max(at, offset), 0))
        return out

    def close(self) -> None:
        assert not self.closed
        assert not self.inside
        self.closed = True


class MemoryDirectory:
    """Satisfies `nbd.device.ExportDirectory`; the default export is the one named, or the only one."""

    def __init__(self, devices: Iterable[MemoryDevice], default: str | None = None) -> None:
        self.devices = {device.name: device for device in devices}
        self.default = default

    def listing(self) -> Iterable[tuple[str, str]]:
        for device in self.devices.values():
            yield device.name, device.description

    def find(self, name: str) -> MemoryDevice | None:
        if name == "":
            if self.default is None and len(self.devices) == 1:
                return next(iter(self.devices.values()))
            return self.devices.get(self.default or "")
        return self.devices.get(name)
