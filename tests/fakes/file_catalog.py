"""The catalogue in a real SQLite file, for crash tests: its durable state is the bytes of the file.

Slower than rows in memory, but what is restored after a cut is what SQLite itself wrote, read back by the whole of
`Catalog.open`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.fakes.simulated_disk import SimulatedCatalog, SimulatedDisk


class FileCatalog(SimulatedCatalog):
    """Keeps its files in `scratch`."""

    scratch: Path
    file: Path
    _numbers = itertools.count()

    @classmethod
    def _place(cls) -> Path:
        return cls.scratch / f"catalog-{next(cls._numbers)}"

    @classmethod
    def begin(cls, disk: SimulatedDisk) -> FileCatalog:
        place = cls._place()
        catalog = cls.create(place)
        assert isinstance(catalog, FileCatalog)
        catalog.disk, catalog.file = disk, place
        catalog._record()
        return catalog

    @classmethod
    def restore(cls, disk: SimulatedDisk, state: object) -> FileCatalog:
        assert isinstance(state, bytes)
        place = cls._place()
        place.write_bytes(state)
        catalog = cls.open(place)
        assert isinstance(catalog, FileCatalog)
        catalog.disk, catalog.file = disk, place
        return catalog

    def close(self) -> None:
        super().close()
        self.file.unlink(missing_ok=True)

    def _state(self) -> bytes:
        return self.file.read_bytes()
