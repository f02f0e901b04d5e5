"""ext4 and xfs on a served device survive power cuts under the pool: they mount, what was fsynced is there, clean.

`tools/file-system-cuts` goes on where this ends.
"""

from __future__ import annotations

import pytest

from tests.conformance.running_pool import require, require_loop_mounts
from tests.fakes.crash_oracle import Violation
from tests.fakes.file_system_cuts import EXT4, XFS, FileSystem, Recording
from tests.fakes.mutants import flush_acknowledged_early

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.timeout(280)]


@pytest.fixture(autouse=True)
def machine() -> None:
    require_loop_mounts()
    require("nbdfuse", "losetup", "fusermount3", "fstrim", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")


def cut_and_judge(system: FileSystem, seed: int, *, steps: int, cuts: int) -> None:
    recording = Recording(system, seed)
    recording.record(steps)
    try:
        for number, cut in enumerate(recording.cuts(cuts)):
            cut.judge(with_snapshots=number == cuts - 1)
    finally:
        recording.close()


@pytest.mark.parametrize("system", [EXT4, XFS], ids=lambda system: system.name)
def test_a_file_system_after_power_cuts(system: FileSystem) -> None:
    cut_and_judge(system, 1, steps=30, cuts=2)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10, 13))
@pytest.mark.parametrize("system", [EXT4, XFS], ids=lambda system: system.name)
def test_a_file_system_after_many_power_cuts(system: FileSystem, seed: int) -> None:
    cut_and_judge(system, seed, steps=60, cuts=15)


def test_flushes_that_do_nothing_are_noticed() -> None:
    """The judge sees what a server costs its clients that answers FLUSH without a commit."""
    with flush_acknowledged_early(), pytest.raises(Violation):
        cut_and_judge(EXT4, 1, steps=20, cuts=20)
