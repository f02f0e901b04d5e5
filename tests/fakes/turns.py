"""Threads that take turns: several tasks, one running at a time, and a seed deciding who goes on at every point.

In: locks and conditions that stand in for those of `threading` inside the engine, the tasks, the choice of the next
one. Out: what the tasks do.

A task may lose its turn where it asks for a lock, where it gives one back, and where whoever runs the tasks calls
`switch` (before every operation of the disk). Between such points it runs alone, so a run is a function of the seed
alone and can be replayed. A task that waits for a lock which nobody will give back is found at once: `Deadlock`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import SimpleNamespace, TracebackType
from unittest import mock

from thinpool import catalog, committer, device, engine, free_map, lazy_device, reclaim, session

# How likely the running task keeps its turn at a point where it may lose it; one of these for each run. Rare changes
# find what needs one task to stand still while another does a great deal.
GO_ON = (0.5, 0.8, 0.95, 0.98)


class Deadlock(AssertionError):
    """Every task waits for another."""


class _Task:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.go = threading.Semaphore(0)
        self.waits_for: object | None = None
        self.done = False
        self.failure: BaseException | None = None


class Turns:
    """The schedule. Outside `run` there is one task, the caller, and locks are free."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.switches = 0
        self._tasks: list[_Task] = []
        self._current: _Task | None = None
        self._all_done = threading.Semaphore(0)
        self._broken = False
        self._go_on = 1.0

    @property
    def current(self) -> object:
        """Who runs now: an owner for locks."""
        return self._current or self

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Run the tasks to their ends, interleaved. Raises the first failure."""
        self._go_on = self.random.choice(GO_ON)
        self._tasks = [_Task(work) for work in works]
        threads = [threading.Thread(target=self._life, args=(task,), daemon=True) for task in self._tasks]
        for thread in threads:
            thread.start()
        self._hand_over(self.random.choice(self._tasks))
        self._all_done.acquire()
        self._current = None
        for thread in threads:
            thread.join(10)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if task.failure is not None:
                raise task.failure

    def _life(self, task: _Task) -> None:
        task.go.acquire()
        try:
            if not self._broken:
                task.work()
        except BaseException as error:  # noqa: BLE001 -- told by `run`
            task.failure = error
        task.done = True
        left = [other for other in self._tasks if not other.done]
        if not left:
            self._all_done.release()
            return
        self._next(left)

    def _next(self, among: list[_Task]) -> None:
        """Give the turn to one that can run; the caller goes to sleep or ends."""
        ready = [task for task in among if task.waits_for is None]
        if not ready:
            self._broken = True
            ready = among
            for task in among:
                task.waits_for = None
        self._hand_over(self.random.choice(ready))

    def _hand_over(self, task: _Task) -> None:
        self._current = task
        task.go.release()

    def switch(self) -> None:
        """A point where another task may go on."""
        task = self._current
        if task is None or len(self._tasks) < 2 or self.random.random() < self._go_on:
            return
        others = [
            other for other in self._tasks if not other.done and other.waits_for is None and other is not task
        ]
        if others:
            self.switches += 1
            self._hand_over(self.random.choice(others))
            self._sleep(task)

    def block(self, reason: object) -> None:
        """The running task cannot go on before `wake` is called for the same reason."""
        task = self._current
        if task is None:
            raise Deadlock(f"nobody else could give back {reason}")
        task.waits_for = reason
        self._next([other for other in self._tasks if not other.done])
        self._sleep(task)

    def _sleep(self, task: _Task) -> None:
        task.go.acquire()
        if self._broken:
            raise Deadlock("every task waits for another")

    def wake(self, reason: object) -> None:
        """Whoever waits for this may go on."""
        for task in self._tasks:
            if task.waits_for is reason:
                task.waits_for = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The engine's modules make our locks while this lasts."""

        def lock() -> TurnLock:
            return TurnLock(self, reentrant=False)

        def rlock() -> TurnLock:
            return TurnLock(self, reentrant=True)

        names = SimpleNamespace(
            Lock=lock, RLock=rlock, Condition=lambda: TurnCondition(self), Event=threading.Event, Thread=None
        )
        with contextlib.ExitStack() as patches:
            for module in (catalog, committer, engine, free_map, lazy_device, reclaim):
                patches.enter_context(mock.patch.object(module, "threading", names))
            patches.enter_context(mock.patch.multiple(device, Lock=lock, RLock=rlock))
            patches.enter_context(mock.patch.object(session, "Lock", lock))
            yield


class TurnLock:
    """`Lock` or `RLock`."""

    def __init__(self, turns: Turns, *, reentrant: bool) -> None:
        self._turns = turns
        self._reentrant = reentrant
        self._owner: object | None = None
        self._depth = 0

    def acquire(self) -> bool:
        turns = self._turns
        turns.switch()
        me = turns.current
        while self._owner is not None and not (self._reentrant and self._owner is me):
            turns.block(self)
        self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        assert self._depth, "released and not held"
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._turns.wake(self)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class TurnCondition(TurnLock):
    """`Condition` with a lock of its own."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(turns, reentrant=False)
        self._news = object()

    def wait(self) -> None:
        self.release()
        self._turns.block(self._news)
        self.acquire()

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> None:
        """Until it holds; the time-out is for those who are never woken, which `Deadlock` tells here."""
        while not predicate():
            self.wait()

    def notify_all(self) -> None:
        self._turns.wake(self._news)
