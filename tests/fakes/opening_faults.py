"""Faults while a pool is opened after its server was killed, the replay of the mapping journal included.

In: choosing where a scenario is killed, one opening with one fault, what must hold after it. Out: faults while a pool is
in use (`fault_search`), kills during the replay (`crash_kills`).

An opening that meets a fault works all the same or refuses in one sentence, and then a later one finds everything that
was answered. One thing is given up: where the data could not be flushed nobody knows what is left of writes that no
client flushed, and the sentence says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.fakes.crash_faults import FAILURES, KINDS, Fault, FaultyScenario, faulty_scenario_of
from tests.fakes.crash_oracle import FlushBegin, FlushEnd, Violation
from tests.fakes.fault_search import STEPS, Count, compare_opened, kind_in_words, look_after_a_cut
from thinpool.errors import RecoveryLost, ThinPoolError


@dataclass(frozen=True, slots=True)
class Kill:
    """A seed's scenario of `steps` steps is killed after some of them; `operations` is what opening it does then."""

    seed: int
    steps: int
    after: int
    operations: tuple[str, ...]

    def faults(self) -> Iterator[tuple[str, Fault]]:
        """Every operation of the opening with every way it can fail, once and from then on."""
        for number, operation in enumerate(self.operations):
            for kind in KINDS[operation]:
                for lasting in (False,) if kind == "short" else (False, True):
                    yield operation, Fault(number, kind, lasting)


def kills(seed: int, most: int, steps: int = STEPS) -> list[Kill]:
    """Up to `most` kills after which there is something to replay: those with most entries."""
    run = faulty_scenario_of(seed, Fault(), steps)
    entries = {}
    for step in range(1, steps + 1):
        run.step()
        journal = run.pool.engine.journal
        if journal is not None and journal._area.used and run.pool.engine.failure is None:
            entries[step] = journal._area.used
    run.close()
    run.disk.close()
    chosen = sorted(entries, key=lambda step: -entries[step])[:most]
    return [kill_after(seed, step, steps) for step in sorted(chosen)]


def kill_after(seed: int, after: int, steps: int = STEPS) -> Kill:
    """The kill of a seed's scenario after so many of its steps."""
    seen: list[str] = []
    run = _killed(seed, steps, after)

    def note(operation: str, count: int) -> int:
        seen.append(operation)
        return count

    run.disk.before = run.disk.before_journal = note
    run.pool = run._open()
    run.close()
    run.disk.close()
    return Kill(seed, steps, after, tuple(seen))


def _killed(seed: int, steps: int, after: int) -> FaultyScenario:
    run = faulty_scenario_of(seed, Fault(), steps)
    for _ in range(after):
        run.step()
    run._clients.clear()
    run.abandon_pool()
    return run


def open_with_fault(kill: Kill, fault: Fault, count: Count) -> None:
    """Open a killed pool with a fault in that. Raises Violation."""
    run = _killed(kill.seed, kill.steps, kill.after)
    count.tried += 1
    count.killed += 1
    try:
        _open_and_judge(run, kill, fault, count)
    except Exception as error:
        raise Violation(
            f"seed {kill.seed} killed after {kill.after} steps, operation {fault.number} of opening "
            f"({kind_in_words(fault)}), {fault.struck or 'never reached'}: {error!r}; did {'; '.join(run.text)}"
        ) from error
    finally:
        run.close()
        run.disk.close()


def _open_and_judge(run: FaultyScenario, kill: Kill, fault: Fault, count: Count) -> None:
    run.fault = fault
    run.disk.before = run.disk.before_journal = fault.before
    refusal: Exception | None = None
    # Replaying ends with a commit, and that is a flush of everything answered.
    number = run.number()
    run.mark(FlushBegin(number))
    try:
        run.pool = run._open()
    except FAILURES as error:
        refusal = error
    if not fault.struck:
        raise Violation("the operation was never reached")
    run.heal()
    if refusal is None:
        count.gave_up += run.pool.engine.failure is not None
        if "data flush" in kill.operations:
            run.mark(FlushEnd(number))
    else:
        count.refused += 1
        if not isinstance(refusal, ThinPoolError):
            raise Violation(f"the refusal is no sentence of ours: {refusal!r}")
    look_after_a_cut(run, count)
    if refusal is not None:
        run.pool = run._open()
    problem = compare_opened(run, answered=not isinstance(refusal, RecoveryLost))
    if problem is not None:
        raise Violation(f"{'refused, then' if refusal else 'opened:'} {problem}")
