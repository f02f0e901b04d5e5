"""Deliberate mistakes, to show that the crash search finds mistakes.

Each mutant is a context manager that replaces functions of the real packages for its duration, in tests only. Some
are mistakes that the search did find once. What a mutant breaks is said in `MUTANTS`, with the number of crash
states within which it must be found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.fakes.commit_mutants import (
    data_flushed_before_the_lists_are_taken,
    data_length_not_durable,
    data_not_flushed,
    flush_joins_the_running_commit,
    free_blocks_not_scrubbed,
    freed_blocks_not_punched,
    freed_data_reused_at_once,
    freed_metadata_reused_at_once,
    metadata_changed_in_place,
    metadata_length_not_durable,
    one_metadata_flush,
    overwrites_not_flushed,
    punched_before_commit,
    readers_not_waited_for,
    superblock_first,
    superblock_not_flushed,
    write_under_way_not_waited_for,
)
from tests.fakes.crash_search import ONE_BY_ONE, Budget, Found, ScenarioKind, Search
from tests.fakes.device_mutants import (
    flush_acknowledged_early,
    flush_of_one_device_only,
    flush_skips_unmappings,
    fua_ignored,
    half_of_the_shared_block_copied,
    mapped_before_filled,
    origin_writes_into_its_snapshot,
    shared_block_not_copied,
    sharing_judged_in_transaction,
    snapshot_misses_new_mappings,
    snapshot_waits_for_nobody,
)
from tests.fakes.journal_mutants import journal_believed_after_a_reboot, replay_commits_unflushed_data
from tests.fakes.name_mutants import (
    catalogue_written_in_two_steps,
    growth_shows_the_old_tail,
    names_promoted_early,
    names_staged_in_memory_only,
    rename_forgets_the_snapshots,
    rollback_in_two_steps,
    shrink_zeroes_first,
    staged_names_always_promoted_on_open,
    staged_names_forgotten_on_open,
    transaction_id_not_moved,
)
from tests.fakes.transfer_mutants import (
    bits_copied_after_the_commit,
    complete_before_durable,
    discards_not_recorded,
    fetched_over_newer_content,
    fetched_said_before_durable,
    hold_released_before_the_row_says_so,
    last_blocks_not_fetched,
    list_removed_before_the_row_says_so,
    lists_not_flushed,
    named_before_its_data_is_durable,
    noted_with_an_old_row,
    replaced_in_two_steps,
    snapshot_shares_the_list,
    token_ahead_of_the_data,
    token_before_the_data_is_durable,
    written_device_passes_for_a_base,
)

SEVERAL = ScenarioKind(threads=True)
TRANSFERS = ScenarioKind(transfers=True)


@dataclass(frozen=True, slots=True)
class Mutant:
    """`states`: images within which the search, from the first seed on, must have found it.

    `first_seed`: where the default tests begin, so that they need not go all the way every time.
    `kind`: the scenarios that can show it. `uncut`: it shows without any power cut, to a rare order of events
    only; scenarios are run and not cut then, and `states` is their number.
    """

    switch: Callable[[], AbstractContextManager[object]]
    breaks: str
    states: int
    first_seed: int = 0
    kind: ScenarioKind = ONE_BY_ONE
    uncut: bool = False

    @property
    def name(self) -> str:
        return self.switch.__name__


MUTANTS = [
    Mutant(journal_believed_after_a_reboot, "replays a journal that a power cut left", 20_000),
    Mutant(
        replay_commits_unflushed_data, "commits what a killed server answered without flushing it", 20_000
    ),
    Mutant(data_not_flushed, "commits without flushing the data first", 20_000),
    Mutant(superblock_first, "writes the superblock before the blocks it names", 20_000),
    Mutant(one_metadata_flush, "no flush between the blocks and the superblock", 20_000),
    Mutant(superblock_not_flushed, "no flush after the superblock", 20_000),
    Mutant(metadata_changed_in_place, "overwrites unshared committed blocks", 20_000),
    Mutant(freed_metadata_reused_at_once, "reuses metadata blocks freed in the transaction", 20_000),
    Mutant(freed_data_reused_at_once, "reuses data blocks freed in the transaction", 50_000, first_seed=8),
    Mutant(
        punched_before_commit, "punches data blocks before the commit that frees them", 75_000, first_seed=5
    ),
    Mutant(freed_blocks_not_punched, "hands out freed blocks with their old content", 20_000),
    Mutant(free_blocks_not_scrubbed, "trusts free blocks after a cut to read zeros", 20_000),
    Mutant(names_promoted_early, "promotes names before the metadata commit", 20_000),
    Mutant(names_staged_in_memory_only, "stages names without making them durable", 20_000),
    Mutant(staged_names_forgotten_on_open, "drops staged names whose metadata is committed", 20_000),
    Mutant(staged_names_always_promoted_on_open, "promotes staged names whose metadata is not", 20_000),
    Mutant(transaction_id_not_moved, "does not tie names to a commit", 20_000),
    Mutant(catalogue_written_in_two_steps, "promotes rows one by one", 20_000),
    Mutant(rename_forgets_the_snapshots, "leaves origins with the old name", 20_000),
    Mutant(flush_acknowledged_early, "acknowledges FLUSH without a commit", 20_000),
    Mutant(fua_ignored, "acknowledges FUA without a commit", 20_000),
    Mutant(flush_skips_unmappings, "a flush does not commit when only trims happened", 30_000, first_seed=1),
    Mutant(snapshot_misses_new_mappings, "a snapshot leaves out mappings not in the tree yet", 20_000),
    Mutant(origin_writes_into_its_snapshot, "the origin does not copy after a snapshot", 20_000),
    Mutant(shared_block_not_copied, "breaking of sharing does not copy", 20_000),
    Mutant(half_of_the_shared_block_copied, "copies less of a shared block than it must", 20_000),
    Mutant(overwrites_not_flushed, "a flush skips the data when nothing was allocated", 20_000),
    Mutant(flush_of_one_device_only, "a flush covers its own device only", 30_000, first_seed=1),
    Mutant(rollback_in_two_steps, "rolls back by deleting first", 20_000),
    Mutant(data_length_not_durable, "names data blocks a cut takes away", 20_000),
    Mutant(
        sharing_judged_in_transaction,
        "takes a block for its own whose sharer is not committed gone",
        50_000,
        first_seed=20,
    ),
    Mutant(metadata_length_not_durable, "names metadata blocks a cut takes away", 30_000, first_seed=2),
    Mutant(shrink_zeroes_first, "shrinking destroys what it has not cut off yet", 20_000),
    Mutant(growth_shows_the_old_tail, "growing shows what shrinking cut off", 200_000, first_seed=28),
    Mutant(
        mapped_before_filled,
        "maps a block before its first content is written",
        75_000,
        kind=SEVERAL,
        first_seed=2,
    ),
    Mutant(
        data_flushed_before_the_lists_are_taken,
        "flushes the data before taking the lists",
        75_000,
        kind=SEVERAL,
        first_seed=6,
    ),
    Mutant(
        write_under_way_not_waited_for,
        "commits past a write that has its block only",
        75_000,
        first_seed=3,
        kind=SEVERAL,
    ),
    Mutant(
        readers_not_waited_for,
        "hands out blocks that are still being sent",
        300,
        first_seed=37,
        kind=SEVERAL,
        uncut=True,
    ),
    Mutant(
        snapshot_waits_for_nobody,
        "takes a snapshot in the middle of a write",
        300,
        first_seed=30,
        kind=SEVERAL,
        uncut=True,
    ),
    Mutant(
        flush_joins_the_running_commit,
        "a flush counts on a commit that began before it",
        200_000,
        first_seed=4,
        kind=SEVERAL,
    ),
    Mutant(
        named_before_its_data_is_durable,
        "gives a received device its name before its data is durable",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        token_before_the_data_is_durable,
        "notes how far a stream got before that is durable",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        token_ahead_of_the_data, "notes a record of a stream before it is written", 20_000, kind=TRANSFERS
    ),
    Mutant(
        noted_with_an_old_row,
        "notes progress with a row from before its base was renamed",
        75_000,
        first_seed=4,
        kind=TRANSFERS,
    ),
    Mutant(
        replaced_in_two_steps,
        "moves the old replica out of the way first",
        20_000,
        kind=TRANSFERS,
        first_seed=4,
    ),
    Mutant(
        written_device_passes_for_a_base,
        "takes a device that clients wrote to for what was received",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        fetched_said_before_durable,
        "records that a block was fetched before it is durable",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        fetched_over_newer_content,
        "fetches over what a client wrote or discarded meanwhile",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        discards_not_recorded,
        "forgets discards of blocks that are still in the store",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        bits_copied_after_the_commit,
        "records blocks as fetched that came while it committed",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(lists_not_flushed, "does not flush the list of remote blocks", 20_000, kind=TRANSFERS),
    Mutant(last_blocks_not_fetched, "ends a pull before the last blocks", 20_000, kind=TRANSFERS),
    Mutant(
        complete_before_durable,
        "calls a device complete before its blocks are durable",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        list_removed_before_the_row_says_so,
        "removes the list while the device is still lazy",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(
        hold_released_before_the_row_says_so,
        "lets the store go while the device is still lazy",
        20_000,
        kind=TRANSFERS,
    ),
    Mutant(snapshot_shares_the_list, "gives a snapshot the list of its origin", 20_000, kind=TRANSFERS),
]


UNFIT = ("TypeError", "AttributeError", "NameError", "UnboundLocalError")
BUDGET = Budget(images_per_cut=12)


@dataclass(frozen=True, slots=True)
class Detection:
    """After how many crash states (or, uncut, scenarios) a mutant was found, and with which seed."""

    states: int
    seed: int


def detect(mutant: Mutant, first_seed: int = 0) -> Detection | None:
    """Search from a seed on until a mutant is found; None where it is not within `mutant.states`."""
    search, seed = Search(BUDGET), first_seed

    def spent() -> int:
        return seed - first_seed if mutant.uncut else search.tally.images + search.tally.nested_images

    while spent() <= mutant.states:
        with mutant.switch():
            try:
                if mutant.uncut:
                    search.uncut(seed, kind=mutant.kind)
                else:
                    search.seed(seed, kind=mutant.kind)
            except Found as found:
                # A function that no longer fits its caller is no mistake of the engine.
                assert not found.what.startswith(UNFIT), found.what
                return Detection(spent() + mutant.uncut, seed)
        seed += 1
    return None
