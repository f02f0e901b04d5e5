"""Is a pool that a cut left behind one that the promise allows?

In: two checks of one image. `Checker.check` is quick: the metadata is opened by the real code and recounted from
the roots up, the catalogue is recovered by the real code, and every device's sectors are compared with the
oracle's by number. `Checker.recover` opens the pool with the real engine, reads every byte through a session, then
goes on working with it and opens it again. Out: making images (`disk_history`), choosing them (`crash_search`).

Both are exact. What makes the first one quick is that the metadata's part of the answer depends on nothing but the
blocks that were read to find it, so the answer for one image holds for every image that has the same content in
those blocks; only the comparison of the data is done anew for each.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from metadata import MetadataError, PoolMetadata, ShortRead, recount
from tests.fakes.crash_arrivals import Arrivals, as_read, half_problem, read_whole, unread
from tests.fakes.crash_oracle import DeviceModel, Violation, World
from tests.fakes.crash_scenario import Scenario
from tests.fakes.disk_history import Contents, Image, Kind
from tests.fakes.simulated_disk import BLOCK_SECTORS, SECTOR_BYTES, SimulatedCatalog, SimulatedDisk
from thinpool.catalog import CatalogEntry
from thinpool.errors import ThinPoolError

DATA_BLOCK_SECTORS = 128
# Names that were staged, entries of the journal, lists of blocks that no device has.
WRITTEN_BY_OPENING = (Kind.CATALOG, Kind.JOURNAL, Kind.FILES)
THIN_CHECK = shutil.which("thin_check", path="/usr/sbin:/usr/bin:/sbin:/bin")


@dataclass(frozen=True, slots=True)
class View:
    """What the metadata says: mappings (thin blocks, data blocks) by device."""

    transaction_id: int
    data_blocks: int
    devices: dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(slots=True)
class _Remembered:
    """An answer, and the sectors it was found in with what they held."""

    sectors: np.ndarray
    held: np.ndarray
    size: int
    view: View


class ImageStore:
    """A metadata image as a `BlockStore`, read-only in effect; notes which blocks were read."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.blocks: set[int] = set()

    def read(self, first: int, count: int) -> bytes:
        self.blocks.update(range(first, first + count))
        data = self.image[first * 4096 : (first + count) * 4096]
        if len(data) < count * 4096:
            raise ShortRead(first, count, len(data))
        return data

    def write(self, first: int, data: bytes) -> None:
        raise Violation(f"opening wrote {len(data)} bytes of metadata at block {first}")

    def flush(self) -> None:
        raise Violation("opening flushed the metadata")

    def size_blocks(self) -> int:
        return len(self.image) // 4096

    def close(self) -> None:
        pass


class Checker:
    """Checks images over one table of contents."""

    def __init__(
        self,
        contents: Contents,
        catalogs: type[SimulatedCatalog] = SimulatedCatalog,
        *,
        after_faults: bool = False,
        run: Scenario | None = None,
    ) -> None:
        """`after_faults`: the pool may be marked as needing a check, and opens read-only then.

        `run`: what made the images, and what may go on with them.
        """
        self._after_faults = after_faults
        self._run = run
        self._arrivals = Arrivals(None if run is None else run.travelling)
        self._contents = contents
        self._catalogs = catalogs
        self._remembered: list[_Remembered] = []
        self._names: dict[tuple[object, int], list[CatalogEntry]] = {}
        self.metadata_opened = 0

    # --- the quick check ---

    def check(self, image: Image, worlds: Iterable[World]) -> World:
        """Return the world the image shows. Raises Violation."""
        view = self.view(image)
        entries = self.entries(image, view.transaction_id)
        if image.data.sectors < view.data_blocks * DATA_BLOCK_SECTORS:
            text = f"the data file has {image.data.sectors} sectors, the metadata wants {view.data_blocks} blocks"
            raise Violation(text)
        problems = []
        for world in worlds:
            problem = self._compare(world, view, entries, image)
            if problem is None:
                return world
            problems.append(problem)
        raise Violation("; or: ".join(problems))

    def view(self, image: Image) -> View:
        """Open and audit the metadata. Raises Violation where either finds anything wrong."""
        contents, size = image.metadata.contents, image.metadata.sectors
        for known in reversed(self._remembered):
            if known.size == size and np.array_equal(contents[known.sectors], known.held):
                return known.view
        self.metadata_opened += 1
        store = ImageStore(self._contents.bytes_of(contents[:size]))
        view = _open(store, after_faults=self._after_faults)
        blocks = np.array(sorted(store.blocks))
        sectors = (blocks[:, None] * BLOCK_SECTORS + np.arange(BLOCK_SECTORS)).reshape(-1)
        self._remembered.append(_Remembered(sectors, contents[sectors].copy(), size, view))
        del self._remembered[:-16]
        return view

    def entries(self, image: Image, transaction_id: int) -> list[CatalogEntry]:
        """The names after recovery of the catalogue."""
        key = (image.catalog, transaction_id)
        found = self._names.get(key)
        if found is None:
            catalog = self._catalogs.restore(SimulatedDisk.nowhere(), image.catalog)
            catalog.recover(transaction_id)
            found = catalog.entries()
            catalog.close()
            if len(self._names) > 64:
                self._names.clear()
            self._names[key] = found
        return found

    def _compare(self, world: World, view: View, entries: list[CatalogEntry], image: Image) -> str | None:
        problem = compare_names(world, entries)
        if problem is not None:
            return problem
        ids = {entry.device_id for entry in entries}
        if ids != view.devices.keys():
            return f"the names have devices {sorted(ids)}, the metadata has {sorted(view.devices)}"
        blocks = image.data.contents[: view.data_blocks * DATA_BLOCK_SECTORS].reshape(-1, DATA_BLOCK_SECTORS)
        for entry in entries:
            model = world[entry.name]
            keys, mapped = view.devices[entry.device_id]
            length = -(-model.sectors // DATA_BLOCK_SECTORS)
            if len(keys) and keys[-1] >= length:
                return f"{entry.name} has a mapping past its end"
            actual = np.zeros((length, DATA_BLOCK_SECTORS), np.int32)
            problem = self._arrivals.lay_remote(entry, image, actual) if model.remote else None
            actual[keys] = blocks[mapped]
            shown = actual.reshape(-1)[: model.sectors]
            problem = problem or describe_strangers(entry.name, model, shown, self._contents)
            problem = problem or self._arrivals.identity_problem(entry, shown)
            if problem is not None:
                return problem
        return None

    # --- the thorough check ---

    def recover(self, image: Image, worlds: Iterable[World], random: Random, *, steps: int) -> Scenario:
        """Open the image with the engine, read everything, work on, open it again. Raises Violation.

        Returns the run, whose history is what recovery did, for nested cuts.
        """
        problems = []
        for world in worlds:
            disk = SimulatedDisk(self._contents, image, catalogs=self._catalogs)
            observed = self._observe(disk, world)
            if isinstance(observed, str):
                problems.append(observed)
                disk.close()
                continue
            disk.close()
            return self._work_on(image, observed, random, steps)
        raise Violation("; or: ".join(problems))

    def look(self, image: Image, worlds: Iterable[World]) -> None:
        """Open the image with the engine and read everything. Raises Violation."""
        problems = []
        for world in worlds:
            disk = SimulatedDisk(self._contents, image, catalogs=self._catalogs)
            observed = self._observe(disk, world)
            disk.close()
            if not isinstance(observed, str):
                return
            problems.append(observed)
        raise Violation("; or: ".join(problems))

    def _observe(self, disk: SimulatedDisk, world: World) -> World | str:
        """What every device reads as, as a world with nothing in doubt; or what is wrong."""
        try:
            pool = disk.open()
        except (MetadataError, ThinPoolError, OSError) as error:
            raise Violation(f"the pool does not open: {error}") from error
        try:
            if not pool.writable and not (self._after_faults and pool.engine.metadata.needs_check):
                raise Violation("the pool opens read-only")
            changed = [event for event in disk.events if event.kind not in WRITTEN_BY_OPENING]
            if changed:
                raise Violation(f"opening wrote {len(changed)} times outside the catalogue and the journal")
            entries = pool.catalog.entries()
            problem = compare_names(world, entries) or self._arrivals.files_problem(entries, disk)
            if problem is not None:
                return problem
            seen: World = {}
            for entry in entries:
                model = world[entry.name]
                try:
                    actual = read_whole(pool, entry, self._contents)
                except (MetadataError, ThinPoolError, OSError) as error:
                    raise Violation(f"{entry.name} cannot be read: {error}") from error
                if actual is None:
                    seen[entry.name] = unread(model)
                    continue
                problem = describe_strangers(entry.name, model, actual, self._contents)
                if problem is not None:
                    return problem
                seen[entry.name] = as_read(model, actual)
            return seen
        finally:
            pool.engine.data.close()

    def _work_on(self, image: Image, world: World, random: Random, steps: int) -> Scenario:
        disk = SimulatedDisk(self._contents, image, catalogs=self._catalogs)
        first_number = random.randrange(1 << 40, 1 << 50)
        if self._run is None:
            run = Scenario(disk, random, nbd=False, world=world, first_number=first_number)
        else:
            run = self._run.successor(self._run, disk, random, world, first_number)
        try:
            run.run(steps)
            run.text.append("reopen at the end")
            run._reopen()
            run.compare_all()
        except (MetadataError, ThinPoolError, OSError) as error:
            raise Violation(f"going on ends with {error!r} ({'; '.join(run.text)})") from error
        run.close()
        disk.close()
        return run

    def thin_check(self, image: Image) -> None:
        """Ask Debian's tool. Raises Violation where it complains."""
        if THIN_CHECK is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "metadata")
            path.write_bytes(self._contents.bytes_of(image.metadata.contents[: image.metadata.sectors]))
            done = subprocess.run([THIN_CHECK, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Violation(f"thin_check: {done.stdout.strip()} {done.stderr.strip()}")


def _open(store: ImageStore, *, after_faults: bool) -> View:
    try:
        pool = PoolMetadata.open(store)  # type: ignore[arg-type]
        if pool.needs_check and not after_faults:
            raise Violation("the pool is marked as needing a check")
        pool.unavailable_data()
        wrong = recount(store)
        if wrong:
            raise Violation(f"the recount finds {len(wrong)} problems, first: {wrong[0]}")
        devices = {}
        for record in pool.devices():
            pairs = list(pool.mappings(record.device_id))
            keys = np.concatenate([keys for keys, _ in pairs]) if pairs else np.empty(0, np.uint64)
            values = np.concatenate([values for _, values in pairs]) if pairs else np.empty(0, np.uint64)
            devices[record.device_id] = (keys.astype(np.int64), (values >> np.uint64(24)).astype(np.int64))
    except Violation:
        raise
    except (MetadataError, OSError) as error:
        raise Violation(f"the metadata is damaged: {type(error).__name__} {error}") from error
    return View(pool.transaction_id, pool.data_blocks, devices)


def compare_names(world: World, entries: list[CatalogEntry]) -> str | None:
    """What is wrong with names, sizes, flags and origins."""
    names = {entry.name for entry in entries}
    if names != world.keys():
        return f"devices {sorted(names)}, promised {sorted(world)}"
    for entry in entries:
        model = world[entry.name]
        found = entry.size_bytes, entry.read_only, entry.origin
        promised = model.sectors * SECTOR_BYTES, model.read_only, model.origin
        if found != promised:
            return f"{entry.name} is {found}, promised {promised}"
        problem = half_problem(entry, model)
        if problem is not None:
            return problem
    return None


def describe_strangers(name: str, model: DeviceModel, actual: np.ndarray, contents: Contents) -> str | None:
    """What a device shows that it must not, in words."""
    strangers = model.strangers(actual)
    if not len(strangers):
        return None
    sector = int(strangers[0])
    shown = _words(contents, int(actual[sector]))
    promised = _words(contents, int(model.base[sector]))
    return f"{name} (number {model.number}) shows {len(strangers)} wrong sectors: {sector} has {shown}, not {promised}"


def _words(contents: Contents, number: int) -> str:
    if not number:
        return "zeros"
    words = np.frombuffer(contents.table[number], "<u8")
    if len(np.unique(words)) > 4:
        return "garbage"
    return f"change {words[2]} of device {words[1]} sector {words[3]}"
