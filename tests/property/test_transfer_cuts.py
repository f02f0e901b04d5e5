"""The power is cut, and the server killed, while snapshots arrive: a fixed slice of the crash search with transfers.

What it has found: a received device told of a base that had been renamed or deleted meanwhile
(`test_what_becomes_of_the_base_meanwhile_is_not_forgotten`). `tools/crash-search --transfers` goes on where this ends.
"""

from __future__ import annotations

import os

import pytest

from tests.fakes.crash_kills import run_and_kill
from tests.fakes.crash_search import Budget, ScenarioKind, Search

SLICE = Budget(images_per_cut=6, recover_every=90, recovery_steps=4)


@pytest.mark.parametrize("seed", range(4))
def test_a_slice_with_transfers(seed: int) -> None:
    Search(SLICE).seed(seed, steps=22, kind=ScenarioKind(transfers=True))


@pytest.mark.parametrize("seed", range(2))
def test_a_slice_with_transfers_and_several_at_work(seed: int) -> None:
    Search(SLICE).seed(seed, steps=22, kind=ScenarioKind(transfers=True, threads=True))


def test_transfers_with_several_at_work_without_cuts() -> None:
    search = Search(SLICE)
    for seed in range(1000, 1005):
        search.uncut(seed, steps=30, kind=ScenarioKind(transfers=True, threads=True))


STEPS = 30
KILLS_A_SEED = int(os.environ.get("THINPOOL_KILLS", "8"))


@pytest.mark.parametrize("seed", range(int(os.environ.get("THINPOOL_KILL_SEEDS", "4"))))
def test_a_kill_while_snapshots_arrive(seed: int) -> None:
    operations = run_and_kill(seed, -1, STEPS, transfers=True)
    stride = max(operations // KILLS_A_SEED, 1)
    for number in range(seed % stride, operations, stride):
        run_and_kill(seed, number, STEPS, transfers=True)
