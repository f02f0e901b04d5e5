"""A prefix of an object store: objects in, objects out, with retries and errors that say what to do.

In: the operations everything else here is made of, back-off for what may pass, names for what will not. Out: which
service it is (`backends.py`), what the objects mean (everything else here).

All that is asked of a store: an object appears whole or not at all, and what was written is seen by every read and
listing that begins afterwards. S3, GCS, Azure and a local file system give that.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from thinpool.errors import StoreDamaged, StoreFull, StoreRefused, StoreUnreachable

Result = TypeVar("Result")
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.2
PAUSE_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing. `modified` is the store's clock, seconds since the epoch."""

    key: str
    size_bytes: int
    modified: float


class AbsentError(Exception):
    """There is no object of that key."""


class PassingError(Exception):
    """The store failed in a way that may pass: it is asked again."""


class RefusedError(Exception):
    """The store refused for good."""


class FullError(RefusedError):
    """The store has no room for an object."""


class Backend(Protocol):
    """One service. Raises AbsentError, PassingError, RefusedError, FullError, nothing else."""

    def put(self, key: str, data: bytes, *, create: bool) -> bool:
        """Store an object; durable on return. With `create`: False, and nothing done, where the key is taken."""

    def get(self, key: str, offset: int, length_bytes: int | None) -> bytes:
        """Read an object, or a range of it (shorter where the object ends)."""

    def head(self, key: str) -> Listed:
        """Describe an object."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield all objects below a prefix that ends in a slash, in order of their keys."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone already are fine."""

    def now(self) -> float:
        """What time it is by the clock that dates objects (`Listed.modified`), seconds since the epoch."""

    def sweep(self, before: float) -> int:
        """Remove what killed processes left that no listing shows, if older than `before`; how much it was."""


@dataclass(slots=True)
class Traffic:
    """What went over the wire, by requests asked for (retries are not counted)."""

    puts: int = 0
    gets: int = 0
    lists: int = 0
    deletes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Objects:
    """The objects below one URL. Thread-safe.

    Raises StoreUnreachable when the store stays away, StoreRefused when it says no, StoreFull when it has no room,
    StoreDamaged when an object that must be there is not.
    """

    def __init__(
        self,
        url: str,
        backend: Backend,
        *,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.url = url
        self.traffic = Traffic()
        self._backend = backend
        self._attempts = attempts
        self._sleep = sleep

    def hurried(self, attempts: int) -> Objects:
        """The same objects with fewer attempts, for a caller whom somebody waits for."""
        return Objects(self.url, self._backend, attempts=attempts, sleep=self._sleep)

    def put(self, key: str, data: bytes) -> None:
        """Store an object, in place of an older one of that key."""
        self._ask(key, lambda: self._backend.put(key, data, create=False))
        self.traffic.puts += 1
        self.traffic.bytes_up += len(data)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless the key is taken; False where it is.

        Not every store enforces the condition, so it is looked first: there the check has a gap as long as a request.
        """
        if self.find(key) is not None:
            return False
        self.traffic.puts += 1
        attempt = 0

        def once() -> bool:
            nonlocal attempt
            attempt += 1
            made = self._backend.put(key, data, create=True)
            # After a lost answer the object that is in the way may be the one that was just written.
            return made or (attempt > 1 and self._backend.get(key, 0, None) == data)

        made = self._ask(key, once)
        self.traffic.bytes_up += len(data)
        return made

    def get(self, key: str) -> bytes:
        """Read an object that must be there."""
        found = self.find_content(key)
        if found is None:
            raise StoreDamaged(self.url, key, "it is missing")
        return found

    def find_content(self, key: str) -> bytes | None:
        """Read an object; None where there is none."""
        try:
            data = self._ask(key, lambda: self._backend.get(key, 0, None))
        except AbsentError:
            return None
        finally:
            self.traffic.gets += 1
        self.traffic.bytes_down += len(data)
        return data

    def get_range(self, key: str, offset: int, length_bytes: int) -> bytes:
        """Read a range of an object that must be there. Raises StoreDamaged where it ends early."""
        try:
            data = self._ask(key, lambda: self._backend.get(key, offset, length_bytes))
        except AbsentError:
            raise StoreDamaged(self.url, key, "it is missing") from None
        self.traffic.gets += 1
        self.traffic.bytes_down += len(data)
        if len(data) != length_bytes:
            raise StoreDamaged(self.url, key, f"it ends before byte {offset + length_bytes}")
        return data

    def find(self, key: str) -> Listed | None:
        """Describe an object; None where there is none."""
        self.traffic.gets += 1
        try:
            return self._ask(key, lambda: self._backend.head(key))
        except AbsentError:
            return None

    def list(self, prefix: str) -> list[Listed]:
        """Describe all objects below a prefix that ends in a slash, in order of their keys."""
        found = self._ask(prefix, lambda: list(self._backend.list(prefix)))
        self.traffic.lists += 1 + len(found) // 1000  # services answer a thousand keys to a request
        return found

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone already are fine."""
        if keys:
            self._ask(keys[0], lambda: self._backend.delete(keys))
            self.traffic.deletes += len(keys)

    def now(self) -> float:
        """What time it is by the store's clock, seconds since the epoch."""
        return self._ask("the time", self._backend.now)

    def sweep(self, before: float) -> int:
        """Remove unfinished writes of processes that were killed, older than `before` by the store's clock."""
        return self._ask("unfinished writes", lambda: self._backend.sweep(before))

    def _ask(self, key: str, request: Callable[[], Result]) -> Result:
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, self._attempts + 1):
            try:
                return request()
            except FullError as error:
                raise StoreFull(self.url, key, str(error)) from error
            except RefusedError as error:
                raise StoreRefused(self.url, key, str(error)) from error
            except PassingError as error:
                if attempt == self._attempts:
                    raise StoreUnreachable(self.url, key, str(error)) from error
            self._sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, so that hosts do not retry in step
            pause = min(pause * 2, PAUSE_SECONDS_MAX)
        raise AssertionError(key)
