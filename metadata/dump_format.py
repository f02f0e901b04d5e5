"""The two texts that thin_dump 0.9 writes: XML, and one for people.

In: the lines of a superblock, a device and a list of runs. Out: reading metadata, the
order of the lines (`dump`).

Only XML can be restored. The other form says the same in lines that are easier to read and to compare:
`    (0..4) -> (100..104), 7` are five thin blocks from 0 on, in data blocks from 100 on, mapped at time 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .runs import Runs
from .superblock import Superblock


@dataclass(frozen=True, slots=True)
class DumpFormat:
    """How a dump is worded.

    Attributes:
        superblock: for time, transaction id, flags, version, sectors of a data block, data blocks.
        device: for the id and the record: mapped blocks, transaction id, creation and snapshot time.
        run: for a run of several blocks, what `run_numbers` makes of it.
        single: for one block: thin block, data block, time.
        run_numbers: of first thin block, first data block, length, time.
        device_end, end: behind a device, and behind all.
    """

    superblock: str
    device: str
    run: str
    single: str
    run_numbers: Callable[[int, int, int, int], tuple[int, ...]]
    device_end: str
    end: str

    def head(self, superblock: Superblock) -> str:
        """The beginning of a dump."""
        return self.superblock % (
            superblock.time,
            superblock.transaction_id,
            superblock.flags,
            superblock.version,
            superblock.data_block_sectors,
            superblock.data_space.blocks,
        )

    def lines(self, runs: Runs) -> str:
        """A line for each run."""
        run, single, numbers = self.run, self.single, self.run_numbers
        return "".join(
            [
                single % (begin, data, time) if length == 1 else run % numbers(begin, data, length, time)
                for begin, data, length, time in zip(
                    runs.begins.tolist(),
                    runs.data_begins.tolist(),
                    runs.lengths.tolist(),
                    runs.times.tolist(),
                    strict=True,
                )
            ]
        )


def _as_length(begin: int, data: int, length: int, time: int) -> tuple[int, ...]:
    return begin, data, length, time


def _as_ends(begin: int, data: int, length: int, time: int) -> tuple[int, ...]:
    return begin, begin + length - 1, data, data + length - 1, time


XML = DumpFormat(
    superblock=(
        '<superblock uuid="" time="%d" transaction="%d" flags="%d" version="%d" data_block_size="%d" '
        'nr_data_blocks="%d">\n'
    ),
    device='  <device dev_id="%d" mapped_blocks="%d" transaction="%d" creation_time="%d" snap_time="%d">\n',
    run='    <range_mapping origin_begin="%d" data_begin="%d" length="%d" time="%d"/>\n',
    single='    <single_mapping origin_block="%d" data_block="%d" time="%d"/>\n',
    run_numbers=_as_length,
    device_end="  </device>\n",
    end="</superblock>\n",
)
HUMAN_READABLE = DumpFormat(
    superblock='begin superblock: "", %d, %d, %d, %d, %d, %d\n',
    device="device: %d\nmapped_blocks: %d\ntransaction: %d\ncreation time: %d\nsnap time: %d\n",
    run="    (%d..%d) -> (%d..%d), %d\n",
    single="    %d -> %d, %d\n",
    run_numbers=_as_ends,
    device_end="\n",
    end="end superblock\n",
)
FORMATS: Mapping[str, DumpFormat] = {"xml": XML, "human_readable": HUMAN_READABLE}
