"""What all tests share: hypothesis profiles, the shared data beside the checkout, foreign tools.

HYPOTHESIS_PROFILE chooses how hard property tests search: ``ci`` (the default: derandomised, small) or ``deep``.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes.thin_tools import find_tool

SHARED = Path(__file__).resolve().parents[2] / "shared"

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "deep",
    max_examples=2000,
    stateful_step_count=80,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory of data and designs beside the checkout; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("the shared data directory is missing beside the checkout")
    return SHARED


class _Images(Mapping[str, bytes]):
    """Images by name, expanded when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._paths = {path.name.removesuffix(".bin.xz"): path for path in sorted(directory.glob("*.bin.xz"))}

    def __getitem__(self, name: str) -> bytes:
        return lzma.decompress(self._paths[name].read_bytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@pytest.fixture(scope="session")
def kernel_images(shared_dir: Path) -> Mapping[str, bytes]:
    """Metadata written by the Linux kernel, by name; skips where the images are missing."""
    images = _Images(shared_dir / "data" / "kernel-images")
    if not images:
        pytest.skip("the kernel-made images are missing from the shared data")
    return images


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """A function that gives the path of a program and skips the test where it is missing."""

    def require(name: str) -> str:
        found = find_tool(name)
        if found is None:
            pytest.skip(f"{name} is missing")
        return found

    return require
