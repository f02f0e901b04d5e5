"""A server that is killed loses nothing that was answered, flushed or not, wherever the kill falls.

Power cuts around and after kills are the business of `test_crash_consistency.py`, whose scenarios are killed too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.fakes import journal_mutants
from tests.fakes.crash_kills import run_and_kill
from tests.fakes.crash_oracle import Violation
from tests.fakes.journal_mutants import MUTANTS

STEPS = 30
SEEDS = int(os.environ.get("THINPOOL_KILL_SEEDS", "24"))
# Where rare ones show, so that the search need not be long every time.
HINTS = {
    journal_mutants.shrinking_entered: (60,),
    journal_mutants.length_not_announced: (14,),
    journal_mutants.replay_not_announced: (6, 37),
}
KILLS_A_SEED = int(os.environ.get("THINPOOL_KILLS", "14"))


@pytest.mark.parametrize("shard", range(4))
def test_all_that_was_answered_is_there_after_a_kill(shard: int) -> None:
    for seed in range(shard, SEEDS, 4):
        operations = run_and_kill(seed, -1, STEPS)
        stride = max(operations // KILLS_A_SEED, 1)
        for number in range(seed % stride, operations, stride):
            run_and_kill(seed, number, STEPS)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_deliberate_mistake_is_found(mutant: Callable[[], AbstractContextManager[object]]) -> None:
    with mutant(), pytest.raises(Violation):
        for seed in HINTS.get(mutant, range(40)):
            operations = run_and_kill(seed, -1, STEPS)
            for number in range(seed % 7, operations, 7):
                run_and_kill(seed, number, STEPS)
