"""A pool as a dictionary of bytes, and random work on it that the kernel and we can both do.

In: operations, what each does to the bytes, how the kernel is told and how we do it. Out: who has the pool when, and
the comparison (tests). Neither side's idea of blocks is used here except for one rule of dm-thin: a discard drops only
the blocks it covers entirely (drivers/md/dm-thin.c, process_discard_bio), and what is dropped reads as zeros.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.guest.kernel_pool import KernelPool
from tests.guest.own_pool import OwnPool

UNIT_BYTES = 4096
WRITE_UNITS_MAX = 64
PAYLOAD_BYTES = 2 << 20
DEVICES_MAX = 7


@dataclass(frozen=True, slots=True)
class Create:
    device_id: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    device_id: int
    origin_id: int


@dataclass(frozen=True, slots=True)
class Delete:
    device_id: int


@dataclass(frozen=True, slots=True)
class Write:
    """`length` bytes of the payload from `source` on, at `offset`; all in whole units."""

    device_id: int
    offset: int
    source: int
    length: int


@dataclass(frozen=True, slots=True)
class Discard:
    device_id: int
    offset: int
    length: int


Step = Create | Snapshot | Delete | Write | Discard


@dataclass
class Model:
    """What every device must read. Devices all have one size."""

    device_bytes: int
    block_bytes: int
    payload: bytes
    contents: dict[int, bytearray] = field(default_factory=dict)

    def apply(self, step: Step) -> None:
        """Do a step to the bytes."""
        match step:
            case Create(device_id):
                self.contents[device_id] = bytearray(self.device_bytes)
            case Snapshot(device_id, origin_id):
                self.contents[device_id] = bytearray(self.contents[origin_id])
            case Delete(device_id):
                del self.contents[device_id]
            case Write(device_id, offset, source, length):
                self.contents[device_id][offset : offset + length] = self.payload[source : source + length]
            case Discard(device_id, offset, length):
                begin = -(-offset // self.block_bytes) * self.block_bytes
                end = (offset + length) // self.block_bytes * self.block_bytes
                if begin < end:
                    self.contents[device_id][begin:end] = bytes(end - begin)

    def random_steps(self, rng: random.Random, count: int) -> list[Step]:
        """Choose and apply `count` steps."""
        steps: list[Step] = []
        for _ in range(count):
            step = self._random_step(rng)
            self.apply(step)
            steps.append(step)
        return steps

    def _random_step(self, rng: random.Random) -> Step:
        ids = sorted(self.contents)
        fresh = max(ids, default=0) + 1
        if not ids:
            return Create(fresh)
        kind = rng.choices(("write", "discard", "snapshot", "create", "delete"), (60, 14, 14, 4, 8))[0]
        device_id = rng.choice(ids)
        if kind in ("snapshot", "create") and len(ids) >= DEVICES_MAX:
            kind = "delete"
        if kind == "snapshot":
            return Snapshot(fresh, device_id)
        if kind == "create":
            return Create(fresh)
        if kind == "delete" and len(ids) > 1:
            return Delete(device_id)
        offset = rng.randrange(self.device_bytes // UNIT_BYTES) * UNIT_BYTES
        if kind == "discard":
            return Discard(
                device_id, offset, min(self.device_bytes - offset, rng.randrange(1, 16) * 16 * UNIT_BYTES)
            )
        length = min(self.device_bytes - offset, rng.randrange(1, WRITE_UNITS_MAX + 1) * UNIT_BYTES)
        source = rng.randrange((len(self.payload) - length) // UNIT_BYTES + 1) * UNIT_BYTES
        return Write(device_id, offset, source, length)

    def differences(self, found: dict[int, bytes]) -> list[str]:
        """Where contents are not what they must be: device and first byte."""
        if sorted(found) != sorted(self.contents):
            return [f"devices {sorted(found)} instead of {sorted(self.contents)}"]
        return [
            f"device {device_id}: {len(data)} bytes, first difference at {_first_difference(data, self.contents[device_id])}"
            for device_id, data in found.items()
            if data != self.contents[device_id]
        ]


def _first_difference(one: bytes, other: bytes | bytearray) -> int:
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), -1)


def kernel_lines(pool: KernelPool, steps: Sequence[Step], model: Model) -> list[str]:
    """The steps as a script; the payload is /run/guest/payload."""
    lines: list[str] = []
    for step in steps:
        match step:
            case Create(device_id):
                lines += [pool.message(f"create_thin {device_id}"), pool.thin(device_id, model.device_bytes)]
            case Snapshot(device_id, origin_id):
                lines += [pool.snapshot(device_id, origin_id), pool.thin(device_id, model.device_bytes)]
            case Delete(device_id):
                lines += [f"dmsetup remove thin-{device_id}", pool.message(f"delete {device_id}")]
            case Write(device_id, offset, source, length):
                lines.append(
                    f"busybox dd if=/run/guest/payload of=/dev/mapper/thin-{device_id} bs={UNIT_BYTES} "
                    f"skip={source // UNIT_BYTES} seek={offset // UNIT_BYTES} count={length // UNIT_BYTES} "
                    "oflag=direct conv=notrunc 2>/dev/null"
                )
            case Discard(device_id, offset, length):
                lines.append(f"blkdiscard -o {offset} -l {length} /dev/mapper/thin-{device_id}")
    return lines


def do_ourselves(pool: OwnPool, steps: Sequence[Step], model: Model) -> None:
    """Take the steps with our engine."""
    for step in steps:
        match step:
            case Create(device_id):
                assert pool.create(model.device_bytes) == device_id
            case Snapshot(device_id, origin_id):
                assert pool.snapshot(origin_id) == device_id
            case Delete(device_id):
                pool.delete(device_id)
            case Write(device_id, offset, source, length):
                pool.write(device_id, offset, model.payload[source : source + length])
            case Discard(device_id, offset, length):
                pool.trim(device_id, offset, length)
