"""What transfers do to names, as the oracle understands it: a device begins half, moves on, and is whole in one step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.fakes.crash_oracle import Change, DeviceModel, Half, Layer, Step, World

SECTOR_BYTES = 512


def on_its_way(model: DeviceModel) -> DeviceModel:
    """A half-received device of which any sector may hold what it is to hold, beside what it held before."""
    assert model.half is not None
    contents = model.half.contents[: model.sectors]
    return replace(model, layers=[Layer(Change(model.number, 0, contents), 0, contents)])


@dataclass(slots=True, eq=False)
class BeginReceiving(Step):
    """A hidden device of the size of its base; `_base` None: an empty one."""

    name: str
    number: int
    half: Half
    base: str | None

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"begin {self.name}"

    @property
    def source(self) -> str | None:  # type: ignore[override]
        return self.base

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        base = np.zeros(len(self.half.contents), np.int32) if taken is None else taken.current()
        model = DeviceModel(self.number, base, origin=self.base, half=self.half)
        return {**world, self.name: on_its_way(model)}


@dataclass(slots=True, eq=False)
class SizeReceiving(Step):
    """An increment may be longer or shorter than its base."""

    name: str

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"size {self.name}"

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        model = world[self.name]
        assert model.half is not None
        return {**world, self.name: on_its_way(model.resized(len(model.half.contents)))}


@dataclass(slots=True, eq=False)
class Note(Step):
    """So much is there, durably."""

    name: str
    position_bytes: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"note {self.name} {self.position_bytes}"

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        model = world[self.name].copy()
        assert model.half is not None
        sectors = self.position_bytes // SECTOR_BYTES
        model.base[:sectors] = model.half.contents[:sectors]
        for layer in model.layers:
            layer.hide(0, sectors)
        half = replace(model.half, position_bytes=self.position_bytes)
        return {**world, self.name: replace(model, half=half)}


@dataclass(slots=True, eq=False)
class Finish(Step):
    """The received device gets its name, and takes the place of the one that has it."""

    name: str

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"finish {self.name}"

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        model = world[self.name]
        half = model.half
        assert half is not None
        replaced = world.get(half.target)
        read_only, origin = half.read_only, model.origin
        if replaced is not None:
            read_only = replaced.read_only
            origin = replaced.origin if origin == half.target else origin
        whole = DeviceModel(model.number, half.contents.copy(), read_only, origin)
        rest = {name: device for name, device in world.items() if name != self.name}
        return {**rest, half.target: whole}


@dataclass(slots=True, eq=False)
class BeginPull(Step):
    """A device that has all its content from the first moment on: in the store."""

    name: str
    number: int
    contents: np.ndarray
    read_only: bool
    half: Half | None

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"{self.name} {'lazily' if self.half is None else 'hidden'}"

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        model = DeviceModel(self.number, self.contents.copy(), self.read_only, remote=True, half=self.half)
        return {**world, self.name: model}


@dataclass(slots=True, eq=False)
class Complete(Step):
    """Nothing of a device is in the store any more."""

    name: str

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"complete {self.name}"

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        return {**world, self.name: replace(world[self.name], remote=False, half=None)}
