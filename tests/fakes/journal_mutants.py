"""Deliberate mistakes in keeping and replaying the journal.

Killing servers must find each of `MUTANTS`; the others are found by power cuts and listed in `mutants.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from tests.fakes.simulated_disk import SimulatedData
from thinpool import mapping_journal, opening
from thinpool.device import ThinDevice
from thinpool.mapping_journal import MappingJournal, Witness


def mappings_not_entered() -> AbstractContextManager[object]:
    return mock.patch.object(MappingJournal, "mapped", lambda *_: None)


def trims_not_entered() -> AbstractContextManager[object]:
    return mock.patch.object(MappingJournal, "dropped", lambda *_: None)


def entered_before_filled() -> AbstractContextManager[object]:
    original = ThinDevice._fill

    def fill(self, block: int, old_entry: int, inside: int, data) -> None:  # noqa: ANN001
        index = list(self.block_map.entries).index(old_entry) if old_entry > 1 else None
        if index is not None:
            self.engine.journal.mapped(self.device_id, index, block)
        original(self, block, old_entry, inside, data)

    return mock.patch.object(ThinDevice, "_fill", fill)


def base_moved_after_the_superblock() -> AbstractContextManager[object]:
    original_about, original_committed = MappingJournal.about_to_commit, MappingJournal.committed
    waiting: dict[int, bytes] = {}

    def about(self, superblock: bytes) -> None:  # noqa: ANN001
        waiting[id(self)] = superblock

    def committed(self) -> None:  # noqa: ANN001
        if id(self) in waiting:
            original_about(self, waiting.pop(id(self)))
        original_committed(self)

    return mock.patch.multiple(MappingJournal, about_to_commit=about, committed=committed)


def shrinking_entered() -> AbstractContextManager[object]:
    original = ThinDevice.unmap

    def unmap(self, begin: int, end: int, *, with_the_step: bool = False) -> None:  # noqa: ANN001
        original(self, begin, end, with_the_step=False)

    return mock.patch.object(ThinDevice, "unmap", unmap)


def entries_of_the_commit_replayed_again() -> AbstractContextManager[object]:
    """Both areas count whichever superblock is there."""
    original = mapping_journal._entries

    def entries(content: bytes, generation: int, entries_max: int):  # noqa: ANN202
        return original(content, generation - 1, entries_max) + original(content, generation, entries_max)

    return mock.patch.object(mapping_journal, "_entries", entries)


def never_replayed() -> AbstractContextManager[object]:
    return mock.patch.object(opening, "_entries_left", lambda _: [])


def length_not_announced() -> AbstractContextManager[object]:
    """A longer metadata file looks like one that somebody else wrote to."""
    return mock.patch.object(MappingJournal, "about_to_lengthen", lambda _: None)


@contextmanager
def journal_believed_after_a_reboot() -> Iterator[None]:
    with (
        mock.patch.object(
            Witness, "digest", lambda self, superblock: hashlib.blake2b(superblock, digest_size=32).digest()
        ),
        mock.patch.object(Witness, "metadata_changed_ns", lambda self: 0),
    ):
        yield


@contextmanager
def replay_commits_unflushed_data() -> Iterator[None]:
    original = opening._replay

    def replay(*arguments) -> None:  # noqa: ANN002
        with mock.patch.object(SimulatedData, "flush", lambda self: None):
            original(*arguments)

    with mock.patch.object(opening, "_replay", replay):
        yield


def replay_not_announced() -> AbstractContextManager[object]:
    return mock.patch.object(opening, "announce_replay", lambda _: None)


MUTANTS: list[Callable[[], AbstractContextManager[object]]] = [
    mappings_not_entered,
    trims_not_entered,
    entered_before_filled,
    base_moved_after_the_superblock,
    shrinking_entered,
    entries_of_the_commit_replayed_again,
    length_not_announced,
    replay_not_announced,
    never_replayed,
]
