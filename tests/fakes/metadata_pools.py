"""Small pools in memory, kernel-made images, and stores that record or fail: what the metadata tests start from."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from metadata import MemoryStore, PoolMetadata, format_pool, pack_mapping

IMAGES = Path(__file__).resolve().parents[3] / "shared" / "data" / "kernel-images"
INTACT_IMAGES = (
    "tmeta",
    "tmeta_device_id_reuse",
    "tmeta_with_deleted_snapshot",
    "tmeta_with_empty_roots",
    "tmeta_with_metadata_snap",
    "tmeta_with_shared_internal_root",
    "tmeta_with_shared_internals_and_leaves",
)


def kernel_image(name: str) -> bytes:
    """A metadata device written by the Linux kernel; skips the test where the images are not at hand."""
    path = IMAGES / f"{name}.bin.xz"
    if not path.exists():
        pytest.skip(f"kernel-made image {path.name} is not beside the checkout")
    return lzma.decompress(path.read_bytes())


def new_pool(metadata_blocks: int = 2000, data_blocks: int = 40000) -> tuple[MemoryStore, PoolMetadata]:
    store = MemoryStore(metadata_blocks)
    format_pool(store, data_block_sectors=128, data_blocks=data_blocks)
    return store, PoolMetadata.open(store)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def span(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


def packed(blocks: np.ndarray, time: int = 0) -> np.ndarray:
    return np.array([pack_mapping(block, time) for block in blocks.tolist()], np.uint64)


def contents(pool: PoolMetadata, device_id: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for keys, values in pool.mappings(device_id):
        found.update(zip(keys.tolist(), values.tolist(), strict=True))
    return found


class RecordingStore(MemoryStore):
    """Notes every operation: ("write", first, data), ("flush",)."""

    def __init__(self, image: bytes | bytearray) -> None:
        super().__init__(image)
        self.log: list[tuple] = []

    def write(self, first, data):
        self.log.append(("write", first, bytes(data)))
        super().write(first, data)

    def flush(self):
        self.log.append(("flush",))
        super().flush()


class FailingStore(MemoryStore):
    """Fails the n-th write or flush (counting from zero) and everything after it; None never fails."""

    def __init__(self, image: bytes | bytearray, fail_at: int | None = None) -> None:
        super().__init__(image)
        self.fail_at = fail_at
        self.done = 0

    def _step(self):
        if self.fail_at is not None and self.done >= self.fail_at:
            raise OSError(5, "injected")
        self.done += 1

    def write(self, first, data):
        self._step()
        super().write(first, data)

    def flush(self):
        self._step()
        super().flush()
