"""What the devices of random histories live through: changes of content, sizes and names, snapshots, restarts, kills.

In: drawing each step and doing it to the pool and its model. Out: the store (`travel_history.py`), the comparison
(`travel_hosts.py`).
"""

from __future__ import annotations

import random
from collections import Counter

from tests.fakes.device_model import ModelDevice, blocks_in
from tests.fakes.store_place import StorePlace
from tests.fakes.travel_hosts import Host
from thinpool.store.keys import CHUNK_BYTES

MIB = 1 << 20
# Ends of segments (64 MiB) lie inside, at the end of, and outside of devices.
SIZES = [CHUNK_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES, MIB]
# Ends of segments (64 MiB) lie inside, at the end of, and outside of devices.
SIZES = [MIB - 1000, 2 * MIB + 512, 5 * MIB + 512, 64 * MIB, 64 * MIB + 70_000, 66 * MIB, 130 * MIB + 12_345]
DEVICES_MAX = 12
CHANGES = {"write": 6, "zero": 3, "discard": 3, "resize": 2, "snapshot": 4, "rollback": 1, "rename": 1}
ENDS = {"delete": 2, "restart": 1, "kill": 1}


class DeviceLives:
    """The steps that need no other host. A step returns what it did, None where there was nothing to do it with."""

    def __init__(self, chance: random.Random, place: StorePlace, *, background: bool) -> None:
        self.chance = chance
        self.place = place
        self.background = background
        self.counts: Counter[str] = Counter()
        self._number = 0
        self._leaked = False

    def _new_name(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}{self._number}"

    def _one_of(self, names: list[str]) -> str | None:
        return self.chance.choice(names) if names else None

    # --- a device's life ---

    def _create(self, host: Host) -> None:
        name, size = self._new_name("disk"), self.chance.choice(SIZES)
        host.pool.create_device(name, size)
        host.models[name] = ModelDevice(size, host.block_bytes)
        host.write(
            name, size - 1, b"!"
        )  # so that the last block, which the end cuts, matters from the beginning

    def _span(self, model: ModelDevice) -> tuple[int, int]:
        """A range near the beginning, the border of a segment, or the end; aligned half of the time."""
        chance, unit = self.chance, model.block_bytes
        around = [0, 0, 64 * MIB - 2 * unit, model.size_bytes - 3 * unit, model.size_bytes - unit]
        offset = max(0, chance.choice(around)) + chance.randrange(6 * unit)
        length = chance.choice([1, 700, unit, 2 * unit, 5 * unit + 17])
        if chance.random() < 0.5:
            offset, length = offset // unit * unit, -(-length // unit) * unit
        offset = min(offset, model.size_bytes - 1)
        return offset, min(length, model.size_bytes - offset)

    def _content(self, length: int) -> bytes:
        kind = self.chance.randrange(4)
        if kind == 0:
            return bytes(length)
        if kind == 1:
            return bytes([self.chance.randrange(1, 4)]) * length  # equal blocks, on both hosts
        return self.chance.randbytes(length)

    def _changed(self, host: Host, name: str, change: str) -> str | None:
        """One write, zero or discard. Where the store is away it may fail, and then nothing has changed."""
        model = host.models[name]
        offset, length = self._span(model)
        try:
            if change == "write":
                host.write(name, offset, self._content(length))
            elif change == "zero":
                host.zero(name, offset, length, keep=self.chance.random() < 0.5)
            elif change == "read":
                host.read(name, offset, length)
            else:
                host.trim(name, offset, length)
        except OSError:
            # An error is right only where something of the range is missing.
            assert self.place.is_away
            assert blocks_in([(offset, length)], host.block_bytes) & host.missing(name)
            self.counts["refused while the store is away"] += 1
        return f"{name} {offset}+{length}"

    def _plain(self, host: Host, change: str) -> str | None:
        name = self._one_of(host.names(writable=True, lazy=False))
        return None if name is None else self._changed(host, name, change)

    def _write(self, host: Host) -> str | None:
        return self._plain(host, "write")

    def _zero(self, host: Host) -> str | None:
        return self._plain(host, "zero")

    def _discard(self, host: Host) -> str | None:
        return self._plain(host, "discard")

    def _resize(self, host: Host) -> str | None:
        name = self._one_of(host.names(writable=True, lazy=False))
        if name is None:
            return None
        size = self.chance.choice(SIZES)
        if self.chance.random() < 0.5:
            # A little more: what was cut off of the last block comes to lie inside.
            size = host.models[name].size_bytes + self.chance.randrange(6 * CHUNK_BYTES)
        host.pool.resize(name, size, shrink=True)
        host.models[name].resize(size)
        return f"{name} to {size}"

    def _snapshot(self, host: Host) -> str | None:
        origin = self._one_of(host.names(lazy=False))
        if origin is None or len(host.models) >= DEVICES_MAX:
            return None
        name = self._new_name("s")
        host.snapshot(origin, name, read_only=self.chance.random() < 0.85)
        return f"{name} of {origin}"

    def _rollback(self, host: Host) -> str | None:
        name, source = (
            self._one_of(host.names(writable=True, lazy=False)),
            self._one_of(host.names(lazy=False)),
        )
        if name is None or source is None or name == source:
            return None
        host.pool.rollback(name, source, keep=False)
        host.models[name] = host.models[source].copy()
        host.settle()
        return f"{name} to {source}"

    def _rename(self, host: Host) -> str | None:
        old, new = self._one_of(host.names()), self._new_name("r")
        if old is None:
            return None
        host.pool.rename(old, new)
        host.models[new] = host.models.pop(old)
        return f"{old} to {new}"

    def _delete(self, host: Host) -> str | None:
        name = self._one_of(host.names())
        if name is None or len(host.models) < 3:
            return None
        self._leaked |= self.place.is_away and host.is_lazy(name)
        host.pool.delete(name)
        host.forget_model(name)
        if not host.names(writable=True):
            self._create(host)
        return name

    def _restart(self, host: Host) -> str:
        host.restart()
        host.check_all()
        return ""

    def _kill(self, host: Host) -> str:
        committed = self.chance.random() < 0.5
        if committed:
            host.pool.commit()
            host.settle()
        self._leaked |= self.background
        power_cut = self.chance.random() < 0.5
        host.kill(self.place, power_cut=power_cut)
        host.check_all()
        return f"{'by a power cut' if power_cut else ''}{', after a commit' if committed else ''}"
