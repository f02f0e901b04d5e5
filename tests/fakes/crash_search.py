"""Cutting the power at every point of a history, in every way that a budget allows.

In: which images of a cut are tried, counting them, replay and shrinking of what was found. Out: what a scenario
does, what makes an image right or wrong.

For every event of a history, marks included, the images tried are: nothing pending arrived; everything did; and as
many random subsets as the budget says, by sectors (torn) and by whole writes, with few, half or nearly all of them
arriving, and with single writes left out or alone arriving. Every image gets the quick check; some are recovered
with the real engine, which works on, and what it writes while doing so is cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random

import numpy as np

from tests.fakes.crash_check import Checker
from tests.fakes.crash_oracle import Oracle, Violation, World
from tests.fakes.crash_scenario import Scenario, scenario_of
from tests.fakes.crash_threads import threaded_scenario_of
from tests.fakes.crash_transfers import transfer_scenario_of, transfers_simulated
from tests.fakes.crash_transfers_at_once import threaded_transfers_of
from tests.fakes.disk_history import Contents, Digests, Event, Image, Kind, Replay
from tests.fakes.turns import Turns

SHARES = (0.5, 0.5, 0.9, 0.1, 0.98, 0.02)


@dataclass(frozen=True, slots=True)
class Budget:
    """How thoroughly a history is cut."""

    images_per_cut: int = 24
    recover_every: int = 60  # images between two recoveries with the real engine
    recovery_steps: int = 5
    nested_images_per_cut: int = 3
    thin_check_every: int = 0


@dataclass(slots=True)
class Tally:
    """What was done. `digests` are of the images, whatever the history."""

    scenarios: int = 0
    cuts: int = 0
    images: int = 0
    recoveries: int = 0
    nested_images: int = 0
    thin_checks: int = 0
    digests: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ScenarioKind:
    """`threads`: several clients at once. `transfers`: snapshots arrive, by streams and from an object store."""

    threads: bool = False
    transfers: bool = False

    @property
    def name(self) -> str:
        """The kind in words."""
        work = "several at work" if self.threads else "one after the other"
        return f"{work}, with transfers" if self.transfers else work

    @property
    def options(self) -> str:
        """How the tool is told."""
        return f"{' --threads' if self.threads else ''}{' --transfers' if self.transfers else ''}"

    @contextmanager
    def scenarios(self, seed: int, steps: int, contents: Contents) -> Iterator[Callable[[], Scenario]]:
        """What makes the scenario of a seed, and what must hold around all that is done with it."""
        with ExitStack() as around:
            if self.transfers:
                around.enter_context(transfers_simulated())
            if not self.threads:
                make = transfer_scenario_of if self.transfers else scenario_of
                yield lambda: make(seed, steps_max=steps, contents=contents)
                return
            turns = Turns(Random(seed))
            around.enter_context(turns.installed())
            many = threaded_transfers_of if self.transfers else threaded_scenario_of
            yield lambda: many(turns, steps, contents)


ONE_BY_ONE = ScenarioKind()


@dataclass(slots=True)
class Found(Exception):
    """A violation, with what replays it."""

    seed: int
    steps: int
    cut: int
    what: str
    text: list[str]
    images: int = 24
    kind: ScenarioKind = ScenarioKind()

    @property
    def command(self) -> str:
        """What shows the violation again."""
        return f"tools/crash-search --replay {self.seed} --steps {self.steps} --images {self.images}{self.kind.options}"

    def __str__(self) -> str:
        last = "; ".join(self.text[-4:])
        where = f"seed {self.seed}, {self.steps} steps, cut after event {self.cut}"
        return f"{where}: {self.what} (last: {last})\n  replay: {self.command}"


class Search:
    """Cuts one history after the other, counting."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.tally = Tally()

    def seed(self, seed: int, *, steps: int = 60, kind: ScenarioKind = ONE_BY_ONE) -> None:
        """Run and cut the scenario of one seed. Raises Found."""
        contents = Contents()
        with kind.scenarios(seed, steps, contents) as make:
            scenario = self._run(seed, steps, make, kind)
        # Without turns: what is recovered is one thread's.
        with transfers_simulated() if kind.transfers else nullcontext():
            try:
                self.explore(scenario, np.random.Generator(np.random.PCG64(seed)))
            except _Wrong as wrong:
                images = self.budget.images_per_cut
                raise Found(seed, steps, wrong.cut, wrong.what, scenario.text, images, kind) from wrong

    def uncut(self, seed: int, *, steps: int = 60, kind: ScenarioKind = ScenarioKind(threads=True)) -> None:
        """Run the scenario of one seed with several clients at once, and do not cut it. Raises Found."""
        with kind.scenarios(seed, steps, Contents()) as make:
            self._run(seed, steps, make, kind)

    def _run(self, seed: int, steps: int, make: Callable[[], Scenario], kind: ScenarioKind) -> Scenario:
        """The scenario after its last step. Raises Found where it fails without any cut."""
        scenario = None
        try:
            scenario = make()
            scenario.run(steps)
        except Exception as error:
            text = [] if scenario is None else scenario.text
            events = 0 if scenario is None else len(scenario.disk.events)
            what = f"{type(error).__name__}: {error}"
            images = self.budget.images_per_cut
            raise Found(seed, len(text), events, what, text, images, kind) from error
        finally:
            if scenario is not None:
                scenario.close()
                scenario.disk.close()
        self.tally.scenarios += 1
        return scenario

    def explore(self, run: Scenario, random: np.random.Generator) -> None:
        """Cut a finished run everywhere. Raises _Wrong."""
        budget, tally = self.budget, self.tally
        checker = Checker(run.disk.contents, run.disk.catalogs, run=run)
        picker = Random(int(random.integers(1 << 62)))
        # Counted from the seed alone: what is recovered is the same whatever was searched before it.
        tried, checked = picker.randrange(1 << 16), set[int]()
        for cut in self._images(run, random, budget.images_per_cut):
            tally.images += 1
            tried += 1
            if cut.promised:
                checked.clear()
            try:
                worlds = list(cut.oracle.worlds())
                # The same image again, with nothing promised since, is right again.
                if cut.digest not in checked:
                    checker.check(cut.image, worlds)
                    checked.add(cut.digest)
                if budget.recover_every and tried % budget.recover_every == 0:
                    self._recover(checker, cut.image, worlds, picker, random)
                if budget.thin_check_every and tried % budget.thin_check_every == 0:
                    checker.thin_check(cut.image)
                    tally.thin_checks += 1
            except Violation as error:
                raise _Wrong(cut.after, str(error)) from error

    def _recover(
        self, checker: Checker, image: Image, worlds: list[World], picker: Random, random: np.random.Generator
    ) -> None:
        self.tally.recoveries += 1
        run = checker.recover(image, worlds, picker, steps=self.budget.recovery_steps)
        nested = self.budget.nested_images_per_cut
        if not nested:
            return
        for cut in self._images(run, random, nested):
            self.tally.nested_images += 1
            try:
                checker.check(cut.image, cut.oracle.worlds())
            except Violation as error:
                done = "; ".join(run.text)
                raise Violation(
                    f"cut again after event {cut.after} of recovering and going on ({done}): {error}"
                ) from error

    def _images(self, run: Scenario, random: np.random.Generator, count: int) -> Iterator[_Cut]:
        """Every image tried."""
        events, contents = run.disk.events, run.disk.contents
        replay = Replay(run.disk.start.copy())
        oracle = Oracle({name: model.copy() for name, model in run.start_world.items()})
        opened = not _has_format(events)
        digests = Digests(contents)
        promised = False
        for after, event in enumerate(events, 1):
            replay.apply(event)
            worth_it = True
            if event.kind is Kind.MARK:
                worth_it = oracle.hear(event.payload)
                promised = promised or worth_it
            # What the store lost may be missing from the same image.
            promised = promised or event.kind is Kind.STORE
            # Making a pool is atomic by other means: it is built aside and renamed.
            opened = opened or event.kind is Kind.CATALOG
            if not opened or not worth_it or event.kind is Kind.JOURNAL:
                continue
            self.tally.cuts += 1
            digests.base(replay.durable)
            for image in subsets(replay, random, count):
                digest = digests.of(image)
                self.tally.digests.add(digest)
                yield _Cut(after, image, oracle, digest, promised)
                promised = False


@dataclass(slots=True)
class _Cut:
    """One image: after which event, what is promised, whether more than at the image before."""

    after: int
    image: Image
    oracle: Oracle
    digest: int
    promised: bool


@dataclass(slots=True)
class _Wrong(Exception):
    cut: int
    what: str


def _has_format(events: list[Event]) -> bool:
    return bool(events) and events[0].kind is Kind.SIZE


def subsets(replay: Replay, random: np.random.Generator, count: int) -> Iterator[Image]:
    """Images a cut here may leave: the two extremes, then up to `count` - 2 others."""
    sectors = replay.waiting_sectors
    yield replay.latest()
    if not sectors:
        return
    yield replay.durable.copy()
    others = min(count - 2, 4 * sectors)
    for number in range(others):
        kind = number % 4
        if kind == 3 and number % 8 == 3:
            yield replay.cut_one(random, only=bool(random.integers(2)))
        else:
            share = SHARES[int(random.integers(len(SHARES)))]
            yield replay.cut(random, share, torn=kind != 2)


def shrink(found: Found, budget: Budget, *, attempts: int = 12) -> Found:
    """A shorter prefix of the scenario that still fails, by halving and then step by step."""
    low, best = 1, found
    while low < best.steps and attempts:
        attempts -= 1
        middle = (low + best.steps) // 2
        try:
            Search(budget).seed(best.seed, steps=middle, kind=found.kind)
        except Found as shorter:
            best = shorter
            best.steps = min(best.steps, middle)
        else:
            low = middle + 1
    return best
