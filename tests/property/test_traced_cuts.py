"""The power is cut at every system call of a real process that makes a pool and works on it.

Names and devices agree whatever of SQLite's journal, of the catalogue, of new files and of renames arrived: this is
where the simulated disk of the crash search takes SQLite's word.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from metadata import FileStore, recount
from tests.fakes.crash_oracle import Violation
from tests.fakes.file_history import FileHistory
from tests.fakes.thin_tools import find_tool
from tests.fakes.traced_files import MARK, lay_out, trace
from tests.fakes.traced_work import BLOCK, MISTAKES, World
from thinpool.errors import NotAPool, PoolNotFound
from thinpool.opening import open_pool
from thinpool.pool_location import PoolLocation

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.peer
def test_every_system_call_of_a_pools_life(tmp_path: Path) -> None:
    assert cut_everywhere(tmp_path, seed=1, images=int(os.environ.get("THINPOOL_TRACED_IMAGES", "1"))) > 500


@pytest.mark.peer
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_among_system_calls_is_found(tmp_path: Path, mistake: str) -> None:
    """Also what SQLite's FULL leaves open where journals are deleted: that one comes back."""
    with pytest.raises(Violation):
        cut_everywhere(tmp_path, seed=1, images=3, mistakes=[mistake])


@pytest.mark.peer
@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 6))
def test_every_system_call_in_many_ways(tmp_path: Path, seed: int) -> None:
    cut_everywhere(tmp_path, seed=seed, images=20)


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """What is found in thousands of images is not news."""
    logger = logging.getLogger("thinpool")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@quiet_log()
def cut_everywhere(scratch: Path, *, seed: int, images: int, mistakes: Sequence[str] = ()) -> int:
    """Trace the work, cut after each call; return how many images were opened. Raises Violation."""
    if find_tool("strace") is None:
        pytest.skip("strace is missing")
    place, found, random = scratch / "place", scratch / "found", Random(seed)
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fakes.traced_work", str(place / "pool"), *mistakes]
    files, worlds, opened = FileHistory(), [None], 0
    for number, call in enumerate(trace(command, place, scratch, environment)):
        if call.path.startswith(MARK):
            worlds = json.loads(call.path.removeprefix(MARK))
        else:
            files.apply(call)
        if call.name == "open" and not call.creates:
            continue
        for image in files.cuts(random, images):
            shutil.rmtree(found, ignore_errors=True)
            found.mkdir()
            lay_out(image, place, found)
            opened += 1
            try:
                judge(found / "pool", worlds)
            except Violation as error:
                raise Violation(
                    f"seed {seed}, cut after call {number}, {call.name} {call.path[-60:]}: {error}"
                ) from error
    return opened


def is_of_the_machine(error: BaseException | None) -> bool:
    """Whether it came of a lack of descriptors or memory."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return True
        error = error.__cause__
    return False


def judge(path: Path, worlds: list[World | None]) -> None:
    """Raise Violation unless the pool at `path` is one of the worlds."""
    location = PoolLocation.directory(path)
    try:
        location.require()
        pool = open_pool(location)
    except (PoolNotFound, NotAPool):
        if None in worlds:
            return
        raise Violation("there is no pool") from None
    except Exception as error:
        if is_of_the_machine(error):
            raise  # nothing against the pool, and no mistake that was found
        raise Violation(f"the pool does not open: {type(error).__name__}: {error}") from error
    try:
        if not pool.writable:
            raise Violation("the pool opens read-only")
        shown = {}
        for entry in pool.catalog.entries():
            session = pool.open_session(entry)
            first = bytes(session.read_bytes(0, min(BLOCK, entry.size_bytes)))
            session.close()
            shown[entry.name] = entry.size_bytes, {first[at : at + 512] for at in range(0, len(first), 512)}
        if not any(world is not None and fits(world, shown) for world in worlds):
            brief = {
                name: (size, sorted({piece[0] for piece in pieces})) for name, (size, pieces) in shown.items()
            }
            raise Violation(f"found {brief}, promised one of {worlds}")
    finally:
        pool.engine.let_go()  # as a kill does, but at once: there are thousands of these pools
        pool.catalog.close()
        for held in pool._held:
            held.close()
    store = FileStore(location.metadata_path, writable=False)
    wrong = recount(store)
    store.close()
    if wrong:
        raise Violation(f"the recount finds {len(wrong)} problems, first: {wrong[0]}")


def fits(world: World, shown: dict[str, tuple[int, set[bytes]]]) -> bool:
    """Whether names, sizes and contents are those of the world."""
    if world.keys() != shown.keys():
        return False
    return all(
        shown[name][0] == size and shown[name][1] <= {bytes([value]) * 512 for value in values}
        for name, (size, values) in world.items()
    )
