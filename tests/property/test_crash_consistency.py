"""Nothing is ever lost: a fixed slice of the crash search, and that the search finds deliberate mistakes.

What it has found so far, each with a regression test in tests/unit/test_engine_crash_rules.py: a block taken for
exclusive whose sharer had let go only in the running transaction; shrinking that zeroed before it was committed; a
metadata file whose new length a cut took away after the superblock had told of it. Reading for it found more.

`tools/crash-search` goes on where this ends.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from metadata import NotPoolMetadata, PoolMetadata, format_pool, recount
from tests.fakes.crash_check import ImageStore
from tests.fakes.crash_scenario import CHOICES, Scenario, scenario_of
from tests.fakes.crash_search import Budget, Found, ScenarioKind, Search, subsets
from tests.fakes.disk_history import Contents, Kind, Replay
from tests.fakes.file_catalog import FileCatalog
from tests.fakes.mutants import MUTANTS, Mutant, detect
from tests.fakes.simulated_disk import SimulatedDisk, SimulatedStore

SLICE = Budget(images_per_cut=12, recover_every=60, thin_check_every=2500)


@pytest.mark.parametrize("seed", range(20))
def test_a_slice_of_the_search(seed: int) -> None:
    Search(SLICE).seed(seed, steps=50)


@pytest.mark.parametrize("seed", range(6))
def test_a_slice_with_several_at_work(seed: int) -> None:
    Search(SLICE).seed(seed, steps=40, kind=ScenarioKind(threads=True))


def test_several_at_work_without_cuts() -> None:
    search = Search(SLICE)
    for seed in range(1000, 1015):
        search.uncut(seed, steps=40)


def test_the_same_seed_makes_the_same_history() -> None:
    def history(seed: int) -> list[tuple[object, ...]]:
        run = scenario_of(seed)
        run.run(40)
        run.close()
        kept = (event for event in run.disk.events if event.kind not in (Kind.MARK, Kind.JOURNAL))
        return [
            (e.kind, e.file, e.first, None if e.contents is None else e.contents.tolist(), repr(e.payload))
            for e in kept
        ]

    assert history(7) == history(7)


@pytest.mark.parametrize("seed", range(2))
def test_with_the_catalogue_in_a_real_sqlite_file(seed: int, tmp_path: Path) -> None:
    FileCatalog.scratch = tmp_path
    run = scenario_of(seed, catalogs=FileCatalog)
    run.run(30)
    run.close()
    Search(Budget(images_per_cut=3, recover_every=100)).explore(
        run, np.random.Generator(np.random.PCG64(seed))
    )


def test_formatting_leaves_nothing_or_an_empty_pool() -> None:
    for old in (False, True):
        disk = SimulatedDisk(Contents(), metadata_blocks=64)
        store = SimulatedStore(disk)
        if old:
            format_pool(store, data_block_sectors=128, data_blocks=1000)
        begun = len(disk.events)
        format_pool(store, data_block_sectors=256, data_blocks=10, force=True)
        replay, random, seen = Replay(disk.start.copy()), np.random.Generator(np.random.PCG64(1)), set()
        for number, event in enumerate(disk.events):
            replay.apply(event)
            for image in subsets(replay, random, 30) if number >= begun - 1 else ():
                seen.add(formatted_as(ImageStore(disk.contents.bytes_of(image.metadata.contents))))
        assert seen == ({1000, None, 10} if old else {None, 10})


def formatted_as(store: ImageStore) -> int | None:
    try:
        pool = PoolMetadata.open(store)  # type: ignore[arg-type]
    except NotPoolMetadata:
        return None
    assert not recount(store)  # type: ignore[arg-type]
    return pool.data_blocks


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deliberate_mistake_is_found(mutant: Mutant) -> None:
    found = detect(mutant, mutant.first_seed)
    assert found is not None, f"{mutant.name} ({mutant.breaks}) was not found in {mutant.states} states"


def test_what_was_found_can_be_shown_again() -> None:
    """The command that comes with a violation finds it again, whatever was searched before."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "flush_skips_unmappings")
    search = Search(Budget(images_per_cut=12))
    with mutant.switch():
        with pytest.raises(Found) as first:
            for seed in range(20):
                search.seed(seed, steps=40)
        found = first.value
        assert f"tools/crash-search --replay {found.seed} --steps {found.steps} --images 12" in str(found)
        with pytest.raises(Found) as second:
            Search(Budget(images_per_cut=12)).seed(found.seed, steps=found.steps)
    assert (second.value.cut, second.value.what) == (found.cut, found.what)


class AnyOrder(RuleBasedStateMachine):
    """The same steps in the order hypothesis likes, cut everywhere at the end; it shrinks what it finds."""

    run: Scenario | None = None

    @initialize(seed=st.integers(0, 1 << 20), nbd=st.booleans(), data_blocks=st.integers(4, 24))
    def start(self, seed: int, nbd: bool, data_blocks: int) -> None:
        self.seed = seed
        disk = SimulatedDisk(Contents(), metadata_blocks=200)
        disk.format(data_blocks=data_blocks)
        self.run = Scenario(disk, Random(seed), nbd=nbd)

    @precondition(lambda self: self.run is not None)
    @rule(choice=st.sampled_from(sorted(CHOICES)), seed=st.integers(0, 1 << 16))
    def step(self, choice: str, seed: int) -> None:
        assert self.run is not None
        self.run.random = Random(seed)
        self.run.text.append(choice)
        with self.run.timed():
            self.run.take(choice)

    def teardown(self) -> None:
        if self.run is None:
            return
        self.run.compare_all()
        self.run.close()
        search = Search(Budget(images_per_cut=5, recover_every=80, nested_images_per_cut=2))
        search.explore(self.run, np.random.Generator(np.random.PCG64(self.seed)))
        self.run.disk.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=int(os.environ.get("THINPOOL_EXAMPLES", "25")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="THINPOOL_EXAMPLES" not in os.environ,
)
