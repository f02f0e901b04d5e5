"""A pool that grows by itself: by how much, how far, and when it cannot.

In: a step of data or metadata as the settings allow. Out: growing (`pool.py`), when (`space_watch.py`, `engine.py`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from metadata import MetadataError

from .description import METADATA_BLOCK_BYTES
from .errors import ThinPoolError
from .pool_settings import step_bytes
from .wording import iec

if TYPE_CHECKING:
    from .pool import Pool

log = logging.getLogger("thinpool")


class Growth:
    """Growth of one pool by itself."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def by_itself(self, *, data: bool, metadata: bool) -> bool:
        """Grow the data or the metadata by a step, as far as the settings let them. Whether anything grew."""
        pool = self._pool
        with pool.engine.transaction:
            if not pool.writable:
                return False
            settings, present = pool.settings, pool.engine.metadata
            data_bytes = metadata_bytes = None
            if data and not pool.engine.data.is_block_device:
                data_bytes = self._next_size(present.data_blocks * pool.block_bytes, settings.autogrow_limit)
            if metadata and pool.location.metadata_path.is_file():
                metadata_bytes = self._next_size(
                    present.metadata_blocks * METADATA_BLOCK_BYTES, settings.metadata_autogrow_limit
                )
            if data_bytes is None and metadata_bytes is None:
                return False
            try:
                pool.grow(data_bytes, metadata_bytes)
            except (OSError, MetadataError, ThinPoolError) as error:
                log.warning("the pool could not grow by itself: %s", error)
                return False
            for what, size_bytes in (("data", data_bytes), ("metadata", metadata_bytes)):
                if size_bytes is not None:
                    log.info("the %s of the pool grew by itself to %s", what, iec(size_bytes))
            return True

    def _next_size(self, present_bytes: int, limit_bytes: int) -> int | None:
        unit = self._pool.block_bytes
        step = max(step_bytes(self._pool.settings.autogrow_step, present_bytes), unit)
        target = min(present_bytes + step, limit_bytes) // unit * unit
        return target if target > present_bytes else None

    def of_what_is_all_taken(self) -> bool:
        """Before a write is refused: more of what is all taken, where the settings say so."""
        engine = self._pool.engine
        with engine.transaction:
            return self.by_itself(data=not engine.free.available_blocks(), metadata=engine.metadata_is_small)
