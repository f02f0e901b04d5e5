"""Writing a pool's mappings as text, byte for byte as thin_dump 0.9 does.

In: the whole pool, chosen devices, or the metadata snapshot, as a stream of text. Out: how it is
worded (dump_format), reading XML (xml), damaged pools (repair): the first damage ends a dump with an exception.

Reads committed blocks straight from storage. Mappings are merged to runs leaf group by leaf group and over the
borders between them; a group that several devices share is turned into text once and kept while there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .dump_format import XML, DumpFormat
from .errors import DeviceIncomplete, NoMetadataSnapshot
from .pool_metadata import PoolMetadata
from .runs import RunMerger, Runs, find_runs
from .store import BlockStore
from .superblock import Superblock, read_superblock
from .walk import LeafGroup, entries, leaf_groups, read_leaves

Write = Callable[[str], object]

KEPT_CHARACTERS_DEFAULT = 128 << 20


def dump(
    source: BlockStore | PoolMetadata,
    write: Write,
    *,
    held: bool = False,
    devices: Collection[int] | None = None,
    mappings: bool = True,
    form: DumpFormat = XML,
    kept_characters: int = KEPT_CHARACTERS_DEFAULT,
) -> None:
    """Write the committed state of a pool as XML, or in another form.

    Args:
        source: the storage; of an open pool, its storage as last committed.
        write: takes pieces of text, some of them megabytes long.
        held: dump the metadata snapshot. Its number of data blocks is given as 0, as thin_dump does.
        devices: only these; ids that do not exist are ignored.
        mappings: False leaves devices empty.
        form: how it is worded.
        kept_characters: memory for the text of leaves that snapshots may share.

    Raises:
        NotPoolMetadata, BlockDamaged, ShortRead, OSError: it cannot be read; what was written is incomplete.
        DeviceIncomplete: a device has no record or no tree.
        NoMetadataSnapshot: `held`, but there is none.
    """
    store = source.state.store if isinstance(source, PoolMetadata) else source
    superblock = read_superblock(store)
    if held:
        if not superblock.held_root:
            raise NoMetadataSnapshot
        superblock = Superblock.unpack(store.read(superblock.held_root, 1), superblock.held_root)
    _Dump(store, superblock, write, form, kept_characters).run(devices, mappings=mappings)


@dataclass(frozen=True, slots=True)
class _GroupText:
    """A leaf group: its first and last run (which neighbours may go on with) and the text between them."""

    first: Runs
    text: str
    last: Runs | None


class _Dump:
    def __init__(
        self,
        store: BlockStore,
        superblock: Superblock,
        write: Write,
        form: DumpFormat,
        kept_characters: int,
    ) -> None:
        self._format = form
        self._store = store
        self._superblock = superblock
        self._write = write
        self._kept: dict[int, _GroupText] = {}
        self._room = kept_characters

    def run(self, devices: Collection[int] | None, *, mappings: bool) -> None:
        superblock = self._superblock
        ids, roots = entries(self._store, 8, superblock.mapping_root)
        root_of = dict(zip(ids.tolist(), roots.tolist(), strict=True))
        record_ids, records = entries(self._store, 24, superblock.details_root)
        record_of = dict(zip(record_ids.tolist(), records.tolist(), strict=True))
        self._write(self._format.head(superblock))
        for device in sorted(root_of.keys() | record_of.keys()):
            if devices is not None and device not in devices:
                continue
            for table, missing in ((root_of, "mapping tree"), (record_of, "record")):
                if device not in table:
                    raise DeviceIncomplete(device, missing)
            self._write(self._format.device % (device, *record_of[device]))
            if mappings:
                self._device(root_of[device])
            self._write(self._format.device_end)
        self._write(self._format.end)

    def _device(self, root: int) -> None:
        merger = RunMerger()
        for group in leaf_groups(self._store, 8, root):
            part = self._group(group)
            if part is None:
                continue
            self._write(self._format.lines(merger.add_runs(part.first)))
            if part.last is not None:
                self._write(self._format.lines(merger.add_runs(part.last)))
                self._write(part.text)
        self._write(self._format.lines(merger.finish()))

    def _group(self, group: LeafGroup) -> _GroupText | None:
        kept = self._kept.get(group.parent)
        if kept is not None:
            return kept
        keys, values = read_leaves(self._store, 8, group.locations)
        if not len(keys):
            return None
        runs = find_runs(keys, values)
        if len(runs) == 1:
            made = _GroupText(runs, "", None)
        else:
            made = _GroupText(
                _slice(runs, 0, 1), self._format.lines(_slice(runs, 1, -1)), _slice(runs, -1, None)
            )
        self._keep(group.parent, made)
        return made

    def _keep(self, parent: int, made: _GroupText) -> None:
        self._room -= len(made.text)
        if self._room >= 0:
            self._kept[parent] = made
        else:
            self._room += len(made.text)


def _slice(runs: Runs, start: int, stop: int | None) -> Runs:
    return Runs(runs.begins[start:stop], runs.values[start:stop], runs.lengths[start:stop])
