"""Changes of names and sizes, as the oracle understands them: each makes a new world out of an old one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.fakes.crash_oracle import DeviceModel, Step, World


def reparented(world: World, old: str, new: str | None) -> World:
    """The world with every origin `old` called `new`."""
    return {
        name: replace(device, origin=new) if device.origin == old else device
        for name, device in world.items()
    }


def made_of(taken: DeviceModel | None, number: int, *, read_only: bool, origin: str) -> DeviceModel:
    """A new device with the content that a step has taken."""
    assert taken is not None
    model = taken.copy()
    return replace(model, number=number, read_only=read_only, origin=origin)


@dataclass(slots=True, eq=False)
class Create(Step):
    name: str
    number: int
    sectors: int

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return {**world, self.name: DeviceModel(self.number, np.zeros(self.sectors, np.int32))}


@dataclass(slots=True, eq=False)
class TakeSnapshot(Step):
    origin: str
    name: str
    number: int
    read_only: bool

    @property
    def source(self) -> str:
        return self.origin

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return {**world, self.name: made_of(taken, self.number, read_only=self.read_only, origin=self.origin)}


@dataclass(slots=True, eq=False)
class Delete(Step):
    name: str

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return reparented(
            {name: model for name, model in world.items() if name != self.name}, self.name, None
        )


@dataclass(slots=True, eq=False)
class Rename(Step):
    old: str
    new: str

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        moved = {self.new if name == self.old else name: model for name, model in world.items()}
        return reparented(moved, self.old, self.new)


@dataclass(slots=True, eq=False)
class Resize(Step):
    name: str
    sectors: int

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return {**world, self.name: world[self.name].resized(self.sectors)}


@dataclass(slots=True, eq=False)
class Rollback(Step):
    name: str
    snapshot: str
    number: int
    kept: str | None

    @property
    def source(self) -> str:
        return self.snapshot

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        before = world[self.name]
        made = made_of(taken, self.number, read_only=before.read_only, origin=self.snapshot)
        if self.kept is None:
            world = {name: model for name, model in world.items() if name != self.name}
        else:
            # Kept as a snapshot, with exactly what was acknowledged.
            kept = before.snapshot(before.number, read_only=True, origin=before.origin)
            world = {**world, self.kept: kept}
        return {**world, self.name: made}


class PoolOnly(Step):
    """Something that no device shows: growing, metadata snapshots, reopening."""

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return world
