"""Two pools between which snapshots travel, in a place of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import WORK, new_pool
from thinpool.pool import Pool


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="thinpool-travel-", dir=WORK))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def source(place: Path) -> Iterator[Pool]:
    with new_pool(place / "source") as pool:
        yield pool


@pytest.fixture
def target(place: Path) -> Iterator[Pool]:
    with new_pool(place / "target") as pool:
        yield pool
