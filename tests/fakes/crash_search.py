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
from dataclasses import dataclass, field
from random import Random

import numpy as np

from tests.fakes.crash_check import Checker
from tests.fakes.crash_oracle import Oracle, Violation, World
from tests.fakes.crash_scenario import Scenario, scenario_of
from tests.fakes.crash_threads import threaded_scenario_of
from tests.fakes.disk_history import Contents, Event, Image, Kind, Replay
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


@dataclass(slots=True)
class Found(Exception):
    """A violation, with what replays it."""

    seed: int
    steps: int
    cut: int
    what: str
    text: list[str]
    traceback: str = ""

    def __str__(self) -> str:
        last = "; ".join(self.text[-4:])
        return f"seed {self.seed}, {self.steps} steps, cut after event {self.cut}: {self.what} (last: {last})"


class Search:
    """Cuts one history after the other, counting."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.tally = Tally()

    def seed(self, seed: int, *, steps: int = 60, threads: bool = False) -> None:
        """Run and cut the scenario of one seed, with several clients at once if `threads`. Raises Found."""
        contents = Contents()
        if threads:
            turns = Turns(Random(seed))
            with turns.installed():
                scenario = self._run(seed, steps, lambda: threaded_scenario_of(turns, steps, contents))
        else:
            scenario = self._run(seed, steps, lambda: scenario_of(seed, steps_max=steps, contents=contents))
        try:
            self.explore(scenario, np.random.Generator(np.random.PCG64(seed)))
        except _Wrong as wrong:
            raise Found(seed, steps, wrong.cut, wrong.what, scenario.text) from wrong

    def uncut(self, seed: int, *, steps: int = 60) -> None:
        """Run the scenario of one seed with several clients at once, and do not cut it. Raises Found."""
        turns = Turns(Random(seed))
        with turns.installed():
            self._run(seed, steps, lambda: threaded_scenario_of(turns, steps, Contents()))

    def _run(self, seed: int, steps: int, make: Callable[[], Scenario]) -> Scenario:
        """The scenario after its last step. Raises Found where it fails without any cut."""
        scenario = None
        try:
            scenario = make()
            scenario.run(steps)
        except Exception as error:
            text = [] if scenario is None else scenario.text
            events = 0 if scenario is None else len(scenario.disk.events)
            raise Found(seed, len(text), events, f"{type(error).__name__}: {error}", text) from error
        finally:
            if scenario is not None:
                scenario.close()
                scenario.disk.close()
        self.tally.scenarios += 1
        return scenario

    def explore(self, run: Scenario, random: np.random.Generator) -> None:
        """Cut a finished run everywhere. Raises _Wrong."""
        checker = Checker(run.disk.contents, run.disk.catalogs)
        picker = Random(int(random.integers(1 << 62)))
        for cut, image, oracle in self._images(run, random, self.budget.images_per_cut):
            tally = self.tally
            tally.images += 1
            try:
                worlds = list(oracle.worlds())
                checker.check(image, worlds)
                if self.budget.recover_every and tally.images % self.budget.recover_every == 0:
                    self._recover(checker, image, worlds, picker, random)
                if self.budget.thin_check_every and tally.images % self.budget.thin_check_every == 0:
                    checker.thin_check(image)
                    tally.thin_checks += 1
            except Violation as error:
                raise _Wrong(cut, str(error)) from error

    def _recover(
        self, checker: Checker, image: Image, worlds: list[World], picker: Random, random: np.random.Generator
    ) -> None:
        self.tally.recoveries += 1
        run = checker.recover(image, worlds, picker, steps=self.budget.recovery_steps)
        nested = self.budget.nested_images_per_cut
        if not nested:
            return
        for cut, again, oracle in self._images(run, random, nested):
            self.tally.nested_images += 1
            try:
                checker.check(again, oracle.worlds())
            except Violation as error:
                done = "; ".join(run.text)
                raise Violation(
                    f"cut again after event {cut} of recovering and going on ({done}): {error}"
                ) from error

    def _images(
        self, run: Scenario, random: np.random.Generator, count: int
    ) -> Iterator[tuple[int, Image, Oracle]]:
        """Every image tried: (events before the cut, image, oracle)."""
        events, contents = run.disk.events, run.disk.contents
        replay = Replay(run.disk.start.copy())
        oracle = Oracle({name: model.copy() for name, model in run.start_world.items()})
        opened = not _has_format(events)
        digests = contents.digests()
        for cut, event in enumerate(events, 1):
            replay.apply(event)
            promised = event.kind is not Kind.MARK or oracle.hear(event.payload)
            # Making a pool is atomic by other means: it is built aside and renamed.
            opened = opened or event.kind is Kind.CATALOG
            if not opened or not promised:
                continue
            self.tally.cuts += 1
            for image in subsets(replay, random, count):
                self.tally.digests.add(image.digest(digests))
                yield cut, image, oracle


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


def shrink(found: Found, budget: Budget, *, threads: bool = False, attempts: int = 12) -> Found:
    """A shorter prefix of the scenario that still fails, by halving and then step by step."""
    low, best = 1, found
    while low < best.steps and attempts:
        attempts -= 1
        middle = (low + best.steps) // 2
        try:
            Search(budget).seed(best.seed, steps=middle, threads=threads)
        except Found as shorter:
            best = shorter
            best.steps = min(best.steps, middle)
        else:
            low = middle + 1
    return best
