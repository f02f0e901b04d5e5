"""Data blocks set aside for single devices: what is promised to whom, and that nobody else takes it.

In: the reservation of each device (blocks it may always have for itself, as zfs's refreservation), how many of them it
has, and the rule of admission. Out: the one integer that the allocator compares (`free_map.py`), names and the
catalogue (`reserved_devices.py`).

A device with a reservation of R blocks that has E blocks for itself is promised max(R - E, 0) more. The promises of all
devices never exceed what is free or about to be, and a block is handed out only where more are free than are promised
to *others*. So a device can always fill its reservation, whatever the others do.

E is kept as a lower bound, because too high a promise refuses somebody too early, and too low a one breaks a promise:

- A block taken counts at once, under the allocator's lock.
- When mappings go into the tree or out of it, E changes by what this did to the number of allocated blocks: a new block
  adds one, a block of its own that is replaced or discarded takes one away, a shared one does neither. Until then the
  block that was replaced is counted too much, and it is not free yet either: it comes back after the next commit.
- A snapshot shares all blocks of its origin. E is zero from that instant, so the whole reservation must be covered
  anew, or there is no snapshot.
- That another device let go of a shared block is not noticed. `measure` counts afresh, from the tree, before anybody is
  refused; a reservation is not measured when a pool is opened, so opening takes as long as without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from metadata import NoSuchDevice

from .errors import ReservationNotCovered
from .free_map import Claim

if TYPE_CHECKING:
    from .engine import Engine

# Counting afresh reads what a device does not share of its tree. Where that takes long it is done for a tenth of the
# time at most.
MEASURE_SECONDS = 0.01
MEASURE_SHARE = 10


class Reservations:
    """The reservations of one engine, by device id. Changes are made with the engine's transaction held."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._claims: dict[int, Claim] = {}
        self._stale = True
        self._not_before = 0.0

    def of(self, device_id: int) -> Claim | None:
        """What a device may claim; None where nothing is set aside for it. Takes no lock."""
        return self._claims.get(device_id)

    def load(self, device_id: int, blocks: int) -> None:
        """Honour a reservation that was granted before, without asking whether it is covered."""
        self._engine.free.promise(self._claims.setdefault(device_id, Claim()), blocks, 0)

    # --- granting ---

    def grant(self, device_id: int, blocks: int) -> None:
        """Set blocks aside for a device, or for one that is about to be made.

        Raises ReservationNotCovered, with nothing changed.

        What is free counts as of the last commit: a power cut must not bring back what a promise was made of.
        """
        engine = self._engine
        engine.commit_if_dirty()
        engine.reclaim()
        self.measure(at_once=True)
        claim = self._claims.get(device_id, Claim())
        device = engine.devices.get(device_id)
        with nullcontext() if device is None else device.lock:
            if device is not None:
                device.apply_pending()
            self._require(claim, blocks, self._owned(device_id))
            self._claims[device_id] = claim

    def reduce(self, device_id: int, blocks: int) -> None:
        """Set fewer blocks aside, 0 for none; that needs no cover."""
        claim = self._claims.get(device_id)
        if not blocks or claim is None:
            self.drop(device_id)
            return
        device = self._engine.devices.get(device_id)
        with nullcontext() if device is None else device.lock:
            if device is not None:
                device.apply_pending()
            self._engine.free.promise(claim, blocks, claim.owned)
        self._engine.tell_space()

    def drop(self, device_id: int) -> None:
        """Set nothing aside any more."""
        claim = self._claims.get(device_id)
        if claim is not None:
            self._engine.free.promise(claim, 0, 0)
            del self._claims[device_id]
            self._engine.tell_space()

    @contextmanager
    def moving(self, old_id: int, new_id: int, blocks: int, *, checked: bool) -> Iterator[None]:
        """Give the reservation of a device to one that has nothing for itself; taken back where the body fails.

        Not `checked`: the old device is deleted, which frees what it has, so the promise is covered as before.
        """
        claim = self._claims.get(old_id)
        if claim is None:
            yield
            return
        if checked:
            self._look_closer(claim, blocks)
        before = claim.blocks, claim.owned
        self._require(claim, blocks, 0, checked=checked)
        self._claims[new_id] = self._claims.pop(old_id)
        try:
            yield
        except BaseException:
            self._claims[old_id] = self._claims.pop(new_id)
            self._engine.free.promise(claim, *before)
            self.changed()  # it may have been passed over when others were counted
            raise

    def _require(
        self, claim: Claim, blocks: int, owned: int, *, checked: bool = True, sharing: bool = False
    ) -> None:
        engine = self._engine
        coming = engine.reclaimer.waiting_count if checked else None
        lacking = engine.free.promise(claim, blocks, owned, coming)
        if lacking is not None:
            size = engine.block_bytes
            raise ReservationNotCovered(
                (blocks - owned) * size, lacking * size, (engine.free.promised - claim.left) * size, sharing
            )

    # --- what a device has for itself ---

    @contextmanager
    def settling(self, device_id: int) -> Iterator[None]:
        """Around a change of a device's mappings in the tree; `tree` and the device's lock are held."""
        claim = self._claims.get(device_id)
        if claim is None:
            yield
            return
        metadata = self._engine.metadata
        before = metadata.data_blocks_allocated
        yield
        if metadata.held_root:
            # A reader of the metadata keeps what is replaced, so it is not seen in the number of blocks.
            self._engine.free.promise(claim, claim.blocks, self._owned(device_id))
        else:
            self._engine.free.settle(claim, metadata.data_blocks_allocated - before)

    def settle_nothing(self, device_id: int) -> None:
        """No mapping waits to be put into the tree: blocks that were taken and not used are on their way back."""
        claim = self._claims.get(device_id)
        if claim is not None and claim.fresh:
            self._engine.free.settle(claim, 0)

    def cover_sharing(self, device_id: int) -> None:
        """Before a snapshot: see to it that what is free, or promised too generously, is known."""
        claim = self._claims.get(device_id)
        if claim is not None:
            self._look_closer(claim, claim.blocks)

    def _look_closer(self, claim: Claim, blocks: int) -> None:
        """Where so many blocks are not to be had at once: commit, hand back, count afresh."""
        engine = self._engine
        if engine.free.available_blocks(claim) < blocks:
            engine.commit_if_dirty()
            engine.reclaim()
            self.measure(at_once=True)

    @contextmanager
    def sharing(self, device_id: int) -> Iterator[None]:
        """Around making a snapshot of a device whose writers are held off. Raises ReservationNotCovered."""
        claim = self._claims.get(device_id)
        if claim is None:
            yield
            return
        owned = claim.owned
        self._require(claim, claim.blocks, 0, sharing=True)
        try:
            yield
        except BaseException:
            self._engine.free.promise(claim, claim.blocks, owned)
            raise

    # --- counting afresh ---

    def changed(self, *, much: bool = False) -> None:
        """Blocks may have become exclusive. `much`: a device was deleted, counting afresh is worth its time."""
        self._stale = True
        if much:
            self._not_before = 0.0

    def measure(self, *, at_once: bool = False) -> None:
        """Count what devices have for themselves, where that may lower what is promised. `transaction` is held.

        Raises MetadataError.
        """
        began = time.monotonic()
        if not self._stale or (began < self._not_before and not at_once):
            return
        self._stale = False
        for device_id, claim in self._claims.items():
            if claim.left:
                self._measure(device_id, claim)
        took = time.monotonic() - began
        self._not_before = began + (took * MEASURE_SHARE if took > MEASURE_SECONDS else 0.0)

    def _measure(self, device_id: int, claim: Claim) -> None:
        engine = self._engine
        device = engine.devices.get(device_id)
        # Under the device's lock: nothing may be taken between counting and noting.
        with nullcontext() if device is None else device.lock:
            if device is not None and engine.writable and engine.failure is None:
                device.apply_pending()
            engine.free.promise(claim, claim.blocks, self._owned(device_id))

    def _owned(self, device_id: int) -> int:
        try:
            with self._engine.tree:
                return self._engine.metadata.usage(device_id).exclusive_blocks
        except NoSuchDevice:
            return 0  # it is about to be made
