"""An object store in memory for the crash search: outside of the machine whose power is cut, and part of its history.

In: objects, every change of them recorded in the history of the disk that is in use, requests that are refused, what
happens while a request is under way. Out: what lies in it (`travelling_snapshots`).

What was stored or deleted stays so after a cut. Each image of a history knows the objects of its instant, so whoever
lets go of something in the store too early is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tests.fakes.disk_history import Event, Kind
from thinpool.store.objects import AbsentError, Listed, RefusedError

if TYPE_CHECKING:
    from tests.fakes.simulated_disk import SimulatedDisk

URL = "memory://simulated"
Objects = dict[str, bytes]


class SimulatedObjects:
    """See `thinpool.store.objects.Backend`. `refuse_after`: so many more requests are answered, all others refused."""

    in_use: SimulatedObjects

    def __init__(self, disk: SimulatedDisk | None, objects: Objects) -> None:
        self._disk = disk
        self.objects = dict(objects)
        self.refuse_after: int | None = None
        self.refused = False
        self.under_way: Callable[[str], None] = lambda _: None

    def _answer(self) -> None:
        if self._disk is not None:
            self._disk.ask("store request")
        if self.refuse_after is not None:
            if self.refuse_after <= 0:
                self.refused = True
                raise RefusedError("made up")
            self.refuse_after -= 1

    def _changed(self) -> None:
        if self._disk is not None:
            self._disk.events.append(Event(Kind.STORE, payload=dict(self.objects)))

    def put(self, key: str, data: bytes, *, create: bool) -> bool:
        self._answer()
        if create and key in self.objects:
            return False
        self.objects[key] = bytes(data)
        self._changed()
        return True

    def get(self, key: str, offset: int, length_bytes: int | None) -> bytes:
        self._answer()
        if key not in self.objects:
            raise AbsentError(key)
        data = self.objects[key]
        self.under_way(key)
        return data[offset:] if length_bytes is None else data[offset : offset + length_bytes]

    def head(self, key: str) -> Listed:
        self._answer()
        if key not in self.objects:
            raise AbsentError(key)
        return Listed(key, len(self.objects[key]), 0.0)

    def list(self, prefix: str) -> Iterator[Listed]:
        self._answer()
        return iter(
            [
                Listed(key, len(data), 0.0)
                for key, data in sorted(self.objects.items())
                if key.startswith(prefix)
            ]
        )

    def delete(self, keys: Sequence[str]) -> None:
        self._answer()
        for key in keys:
            self.objects.pop(key, None)
        self._changed()
