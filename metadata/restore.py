"""Making a pool from its dump in XML.

In: `restore`, and putting a device's runs in order. Out: reading XML (xml), writing the pool (pool_build).

What a dump does not say is not invented: the metadata snapshot is not made again, numbers of mapped blocks are
counted anew. Leaves that devices have in common are shared again, whether the XML says so or not, so the pool takes no
more metadata than the one that was dumped, give or take; thin_restore 0.9 writes every device out by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import DeviceExists, OutOfRange, RestoreInvalid
from .layout import TIME_BITS, U64Array
from .pool_build import BuildReport, PoolBuilder, PoolFields
from .runs import NO_RUNS, Runs
from .store import BlockStore
from .xml import ByteStream, DeviceHeader, PoolHeader, read_xml

# Mappings made from runs at a time.
_MAPPINGS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Instead:
    """Figures that overrule those of the XML; None leaves them.

    Attributes:
        data_blocks: size of the data in blocks, which is 0 in dumps of a metadata snapshot.
        transaction_id: the pool's, which LVM compares with its own.
        data_block_sectors: size of a data block. Mappings keep their numbers.
    """

    data_blocks: int | None = None
    transaction_id: int | None = None
    data_block_sectors: int | None = None


def restore(stream: ByteStream, store: BlockStore, instead: Instead | None = None) -> BuildReport:
    """Write the pool that `stream` describes over the whole of `store`.

    Args:
        stream: XML as thin_dump 0.9 or 1.x writes it, in bytes.
        store: overwritten; its size becomes that of the metadata.
        instead: figures that overrule the XML.

    Raises:
        XmlInvalid, RestoreInvalid: what is to be restored is no pool.
        OutOfRange: a mapping points outside the data space, or the size of data blocks is impossible.
        MetadataFull: the store is too small.
        OSError: as the stream and the store raise it.
        Whenever it raises after the superblock was read, the store holds no pool.
    """
    maker = _Maker(store, instead or Instead())
    read_xml(stream, maker)
    return maker.finish()


class _Maker:
    """Receives the events of the XML."""

    def __init__(self, store: BlockStore, instead: Instead) -> None:
        self._store = store
        self._instead = instead
        self._builder: PoolBuilder | None = None
        self._device: DeviceHeader | None = None
        self._runs: list[Runs] = []

    def begin_pool(self, header: PoolHeader) -> None:
        instead = self._instead
        fields = PoolFields(
            _either(instead.data_block_sectors, header.data_block_sectors),
            _either(instead.data_blocks, header.data_blocks),
            header.time,
            _either(instead.transaction_id, header.transaction_id),
            header.flags,
            header.uuid,
        )
        self._builder = PoolBuilder(self._store, fields)

    def begin_device(self, header: DeviceHeader) -> None:
        assert self._builder is not None
        try:
            self._builder.begin_device(
                header.device_id, header.transaction_id, header.creation_time, header.snapshotted_time
            )
        except DeviceExists as error:
            raise RestoreInvalid(header.device_id, "it is there twice") from error
        self._device = header

    def runs(self, runs: Runs) -> None:
        self._runs.append(runs)

    def end_device(self) -> None:
        assert self._builder is not None
        assert self._device is not None
        ordered = in_order(self._runs)
        overlap = first_overlap(ordered)
        if overlap is not None:
            raise RestoreInvalid(self._device.device_id, f"thin block {overlap} is mapped twice")
        try:
            for keys, values in expand(ordered):
                self._builder.add(keys, values)
        except OutOfRange as error:
            raise RestoreInvalid(self._device.device_id, str(error)) from error
        self._builder.end_device()
        self._runs = []

    def finish(self) -> BuildReport:
        assert self._builder is not None
        return self._builder.finish()


def _either(given: int | None, found: int) -> int:
    return found if given is None else given


def in_order(parts: list[Runs]) -> Runs:
    """All runs together, ascending."""
    columns = [
        np.concatenate([column, *(getattr(part, name) for part in parts)])
        for name, column in (
            ("begins", NO_RUNS.begins),
            ("values", NO_RUNS.values),
            ("lengths", NO_RUNS.lengths),
        )
    ]
    begins = columns[0]
    if (begins[1:] < begins[:-1]).any():
        order = np.argsort(begins, kind="stable")
        columns = [column[order] for column in columns]
    return Runs(*columns)


def first_overlap(runs: Runs) -> int | None:
    """The first thin block that two of the ascending runs map."""
    lasts = runs.begins + (runs.lengths - np.uint64(1))
    overlapping = runs.begins[1:] <= lasts[:-1]
    return int(runs.begins[1:][overlapping][0]) if overlapping.any() else None


def expand(runs: Runs) -> Iterator[tuple[U64Array, U64Array]]:
    """The mappings of runs, in pieces: keys and packed values."""
    first = 0
    ends = np.cumsum(runs.lengths)
    done = 0
    while first < len(runs):
        stop = max(int(np.searchsorted(ends, np.uint64(done + _MAPPINGS_AT_ONCE), "right")), first + 1)
        part = slice(first, stop)
        if stop == first + 1:
            yield from _expand_one(int(runs.begins[first]), int(runs.values[first]), int(runs.lengths[first]))
        else:
            lengths = runs.lengths[part].astype(np.int64)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            steps = (np.arange(len(starts)) - starts).astype(np.uint64)
            keys = np.repeat(runs.begins[part], lengths) + steps
            yield keys, np.repeat(runs.values[part], lengths) + (steps << np.uint64(TIME_BITS))
        first, done = stop, int(ends[stop - 1])


def _expand_one(begin: int, value: int, length: int) -> Iterator[tuple[U64Array, U64Array]]:
    for offset in range(0, length, _MAPPINGS_AT_ONCE):
        steps = np.arange(offset, min(offset + _MAPPINGS_AT_ONCE, length), dtype=np.uint64)
        yield np.uint64(begin) + steps, np.uint64(value) + (steps << np.uint64(TIME_BITS))
