"""We do no more work for the same operations than the kernel's dm-thin: blocks written, bytes copied, flushes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.counted_work import table, work_of_ours, work_of_the_kernel
from tests.guest.machine import Machine


@pytest.mark.deep  # each discard waits for one of the kernel's commits
def test_no_more_work_than_the_kernel(guest: Machine, tmp_path: Path):
    ours = work_of_ours(tmp_path / "ours")
    kernel = work_of_the_kernel(guest, tmp_path / "kernels")
    both = table(kernel, ours)
    print(both)
    for phase, work in ours.items():
        for figure in work.__slots__:
            assert getattr(work, figure) <= getattr(kernel[phase], figure), f"{phase}, {figure}\n{both}"
