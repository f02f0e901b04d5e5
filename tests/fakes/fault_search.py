"""The search for faults that break the promise: one run of a scenario for every operation and every way it can fail.

In: which faults there are, one run with one fault and everything that must hold after it, counting by kind. Out: the
scenarios (`crash_faults`), the hours and processes (`tools/fault_search.py`).

Of what a run leaves, power cuts are looked at in any case. Every other run is ended by a kill, half of them right after
the fault, the others by closing the pool as well as it goes: after a kill everything answered is there, unless the
pool or its journal had given up, and then what a power cut leaves is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from metadata import PoolMetadata
from tests.fakes.crash_check import Checker, ImageStore, compare_names, describe_strangers
from tests.fakes.crash_faults import FAILURES, KINDS, Fault, FaultyScenario, faulty_scenario_of
from tests.fakes.crash_oracle import Oracle, Violation, World
from tests.fakes.crash_search import subsets
from tests.fakes.disk_history import Kind, Replay
from thinpool.errors import PoolPoisoned

STEPS = 22
IMAGES = 8


@dataclass(slots=True)
class Count:
    """What came of the faults of one kind."""

    tried: int = 0
    refused: int = 0  # requests and commands that were answered with an error
    gave_up: int = 0  # pools
    marked: int = 0  # of them, marked as needing a check
    killed: int = 0
    images: int = 0  # after a cut
    violations: int = 0

    def add(self, other: Count) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Counts:
    """By operation and by the kind of the fault, in words."""

    table: dict[tuple[str, str], Count] = field(default_factory=dict)

    def of(self, operation: str, kind: str) -> Count:
        return self.table.setdefault((operation, kind), Count())

    def add(self, other: Counts) -> None:
        for (operation, kind), count in other.table.items():
            self.of(operation, kind).add(count)


def kind_in_words(fault: Fault) -> str:
    """`EIO`, or `EIO, lasting`."""
    return f"{fault.kind}{', lasting' if fault.lasting else ''}"


def operations(seed: int, steps: int = STEPS) -> list[str]:
    """The operations of a run without faults."""
    seen: list[str] = []
    run = faulty_scenario_of(seed, Fault(), steps)

    def note(operation: str, count: int) -> int:
        seen.append(operation)
        return count

    run.disk.before = run.disk.before_journal = note
    run.run(steps)
    run.close()
    run.disk.close()
    return seen


def faults(seed: int, steps: int = STEPS) -> Iterator[tuple[str, Fault]]:
    """Every operation of a seed's scenario with every way it can fail, once and from then on."""
    for number, operation in enumerate(operations(seed, steps)):
        for kind in KINDS[operation]:
            for lasting in (False,) if kind == "short" else (False, True):
                yield operation, Fault(number, kind, lasting)


def with_fault(seed: int, fault: Fault, count: Count, steps: int = STEPS) -> None:
    """Run a seed's scenario with a fault in it. Raises Violation, with all that was done."""
    run = faulty_scenario_of(seed, fault, steps)
    count.tried += 1
    try:
        for _ in range(steps):
            run.step()
            if fault.struck and fault.number % 4 == 3:
                break
        if not fault.lasting:
            compare(run)
        behaves_after_giving_up(run)
        if fault.lasting:
            compare_what_can_be_read(run)
        journal_is_no_ones_trouble(run)
        count.refused += run.refused
        count.gave_up += run.pool.engine.failure is not None
        if fault.number % 2:
            look_after_a_cut(run, count)
            look_after_a_kill(run, count)
        else:
            close(run)
            look_after_a_cut(run, count)
        # Comparing at the end is left out where everything fails.
        if not (fault.struck or fault.lasting):
            raise Violation("the operation was never reached")
    except Exception as error:
        raise Violation(
            f"seed {seed}, operation {fault.number} ({kind_in_words(fault)}), "
            f"{fault.struck or 'never reached'}: {error!r}; did {'; '.join(run.text)}"
        ) from error
    finally:
        run.close()
        run.disk.close()


def compare(run: FaultyScenario) -> None:
    """Everything reads right, under its name; where the fault falls into reading itself, at the second try."""
    if not run.over:
        compare_shown_names(run)
    try:
        run.compare_all()
    except FAILURES:
        if not run.fault.struck:
            raise
        run.compare_all()


def compare_shown_names(run: FaultyScenario) -> None:
    """The open pool shows the devices it should."""
    problem = compare_names(run.oracle.world, run.pool.catalog.entries())
    if problem is not None:
        raise Violation(f"the open pool shows: {problem}")


def compare_what_can_be_read(run: FaultyScenario) -> None:
    """The disk works again: of a pool that gave up for good everything reads right or not at all, all else right."""
    run.heal()
    if run.over:
        return
    compare_shown_names(run)
    for name in run.oracle.world:
        try:
            run.compare(name)
        except OSError:
            if not run.pool.engine.tree_unknown:
                raise


def journal_is_no_ones_trouble(run: FaultyScenario) -> None:
    """The journal is a help after kills; without it nothing is refused."""
    if run.fault.struck.startswith("journal") and (run.refused or run.pool.engine.failure):
        raise Violation("something was refused because the journal could not be written")


def behaves_after_giving_up(run: FaultyScenario) -> None:
    """A pool that gave up says so to everybody, for good."""
    engine = run.pool.engine
    if engine.failure is None or run.over:
        return
    run.heal()
    try:
        engine.commit_if_dirty()
    except PoolPoisoned:
        pass
    else:
        raise Violation("a pool that gave up commits")
    for name in run.oracle.world:
        entry = run.pool.catalog.by_name(name)
        if entry is None or entry.read_only:
            continue
        try:
            session = run.pool.open_session(entry)
        except OSError:
            if not engine.tree_unknown:
                raise
            continue
        for length in (None, 512, min(65536, entry.size_bytes)):
            session.enter()
            try:
                if length is None:
                    session.flush()
                else:
                    session.write(0, memoryview(bytes(length)))
            except OSError as error:
                if "read-only" not in str(error):
                    raise
            else:
                raise Violation("a pool that gave up takes writes or flushes")
            finally:
                session.leave()
                session.sent()
        session.close()


def close(run: FaultyScenario) -> None:
    """Close the pool as well as it goes."""
    try:
        run.pool.close()
    except FAILURES as error:
        if not run.fault.struck:
            raise Violation(f"closing failed without a fault: {error}") from error


def look_after_a_cut(run: FaultyScenario, count: Count) -> None:
    """Images that a power cut now would leave, and the one with everything that was written."""
    # Where only the names could not be written, the metadata needs no check.
    poisoned = run.pool.engine.failure is not None and not run.fault.struck.startswith("catalogue")
    replay, oracle = Replay(run.disk.start.copy()), Oracle()
    for event in run.disk.events:
        replay.apply(event)
        if event.kind is Kind.MARK:
            oracle.hear(event.payload)
    checker = Checker(run.disk.contents, after_faults=True)
    worlds = list(oracle.worlds())
    for image in subsets(replay, np.random.Generator(np.random.PCG64(run.fault.number)), IMAGES):
        checker.check(image, worlds)
        count.images += 1
    latest = replay.latest()
    checker.look(latest, worlds)
    count.images += 1
    if poisoned and not run.fault.lasting:
        store = ImageStore(run.disk.contents.bytes_of(latest.metadata.contents[: latest.metadata.sectors]))
        if not PoolMetadata.open(store, writable=False).needs_check:  # type: ignore[arg-type]
            raise Violation("a failed commit is not recorded, although it could have been")
        count.marked += 1


def look_after_a_kill(run: FaultyScenario, count: Count) -> None:
    """Kill the server, open the pool again where the disk works again, and read everything."""
    engine = run.pool.engine
    kept = (
        engine.failure is None and engine.writable and engine.journal is not None and engine.journal._active
    )
    run._clients.clear()
    run.abandon_pool()
    run.heal()
    run.pool = run._open()
    count.killed += 1
    problem = compare_opened(run, answered=kept)
    if problem is not None:
        raise Violation(f"after a kill: {problem}")


def compare_opened(run: FaultyScenario, *, answered: bool) -> str | None:
    """What is wrong with a pool that was opened anew. `answered`: everything answered must be there."""
    problems = []
    for world in run.oracle.worlds():
        problem = compare_names(world, run.pool.catalog.entries())
        problem = problem or _contents_differ(run, world, answered=answered)
        if problem is None:
            return None
        problems.append(problem)
    return "; or: ".join(problems)


def _contents_differ(run: FaultyScenario, world: World, *, answered: bool) -> str | None:
    """What a device shows that it must not. `answered`: everything answered must be there, flushed or not."""
    for name, model in world.items():
        promised = model.copy()
        if answered:
            promised.fold({layer.change.number for layer in promised.layers})
        entry = run.pool.catalog.by_name(name)
        assert entry is not None
        session = run.pool.open_session(entry)
        actual = run.disk.contents.intern(bytes(session.read_bytes(0, entry.size_bytes)))
        session.close()
        problem = describe_strangers(name, promised, actual, run.disk.contents)
        if problem is not None:
            return problem
    return None
