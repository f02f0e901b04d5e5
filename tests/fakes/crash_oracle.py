"""What a pool must and may show after a cut: a model of its devices that hears what clients were promised.

In: promises by device and 512-byte sector, the set of names, the marks that tell of them. Out: disks and images.

Theory of operation. A device is a row of sector contents (numbers, see `disk_history`): `base` is what was promised,
the value at the last acknowledged flush. Every change since then is a `Layer`; a sector may show the base or any
layer over it, because a cut keeps any subset of what was not flushed. An acknowledged flush folds the layers that
were acknowledged before it was asked for into the base; what was in flight or failed stays a layer. Changes of
names and sizes are promised when they return, and until then wholly done or not at all: while one is in flight there
are two worlds, and the recovered pool must be exactly one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import numpy as np

SECTOR_BYTES = 512


class Violation(AssertionError):
    """The promise is broken."""


class Stage(Enum):
    IN_FLIGHT = auto()
    ACKNOWLEDGED = auto()
    FAILED = auto()


@dataclass(slots=True, eq=False)
class Change:
    """A write, trim or zeroing as its client knows it: sectors of one device, by the device's number.

    `contents` None: nothing changes (a flush).
    """

    device: int
    first: int
    contents: np.ndarray
    number: int = 0
    text: str = ""


@dataclass(slots=True, eq=False)
class Layer:
    change: Change
    first: int
    contents: np.ndarray
    stage: Stage = Stage.IN_FLIGHT
    mask: np.ndarray | None = None

    def hide(self, first: int, end: int) -> None:
        """Nothing of this layer can be seen in [first, end) any more."""
        low, high = max(first - self.first, 0), min(end - self.first, len(self.contents))
        if low < high:
            if self.mask is None:
                self.mask = np.ones(len(self.contents), np.bool_)
            self.mask[low:high] = False


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """A device that is not whole: what it is to hold, and up to where that was promised to be there.

    `streamed`: by a stream, into a device of another name; otherwise it is pulled.
    """

    target: str
    content_id: str
    contents: np.ndarray
    streamed: bool
    base_content_id: str | None = None
    resumable: bool = False
    read_only: bool = False
    position_bytes: int = 0


@dataclass(slots=True)
class DeviceModel:
    """One device. `number` stays the same through renames and is never used twice.

    `remote`: part of its content may still be in an object store. `half`: nobody may use it yet.
    """

    number: int
    base: np.ndarray
    read_only: bool = False
    origin: str | None = None
    layers: list[Layer] = field(default_factory=list)
    remote: bool = False
    half: Half | None = None

    @property
    def sectors(self) -> int:
        return len(self.base)

    def copy(self) -> DeviceModel:
        layers = [
            replace(layer, mask=None if layer.mask is None else layer.mask.copy()) for layer in self.layers
        ]
        return replace(self, base=self.base.copy(), layers=layers)

    def begin(self, change: Change) -> None:
        self.layers.append(Layer(change, change.first, change.contents))

    def settle(self, change: Change, stage: Stage) -> None:
        for layer in self.layers:
            if layer.change is change:
                layer.stage = stage

    def fold(self, wanted: set[int]) -> None:
        """The acknowledged changes of these numbers are promised."""
        kept: list[Layer] = []
        for layer in self.layers:
            if layer.change.number in wanted and layer.stage is Stage.ACKNOWLEDGED:
                end = layer.first + len(layer.contents)
                span = self.base[layer.first : end]
                if layer.mask is None:
                    span[:] = layer.contents
                else:
                    span[layer.mask] = layer.contents[layer.mask]
                for older in kept:
                    older.hide(layer.first, end)
            else:
                kept.append(layer)
        self.layers = [layer for layer in kept if layer.mask is None or layer.mask.any()]

    def current(self) -> np.ndarray:
        """What a reader sees now, if nothing failed or is in flight."""
        contents = self.base.copy()
        for layer in self.layers:
            if layer.stage is Stage.ACKNOWLEDGED:
                span = contents[layer.first : layer.first + len(layer.contents)]
                if layer.mask is None:
                    span[:] = layer.contents
                else:
                    span[layer.mask] = layer.contents[layer.mask]
        return contents

    @property
    def in_doubt(self) -> bool:
        return any(layer.stage is not Stage.ACKNOWLEDGED for layer in self.layers)

    def snapshot(self, number: int, *, read_only: bool, origin: str | None) -> DeviceModel:
        """A new device with the content of now. What is in flight or failed may be in it or not."""
        layers = [replace(layer, mask=None) for layer in self.layers if layer.stage is not Stage.ACKNOWLEDGED]
        for older in layers:
            for layer in self.layers[self._position(older) + 1 :]:
                if layer.stage is Stage.ACKNOWLEDGED:
                    older.hide(layer.first, layer.first + len(layer.contents))
        return DeviceModel(number, self.current(), read_only, origin, layers, self.remote)

    def _position(self, copied: Layer) -> int:
        return next(i for i, layer in enumerate(self.layers) if layer.change is copied.change)

    def resized(self, sectors: int) -> DeviceModel:
        """The device with another length; what is added reads zeros."""
        model = self.copy()
        kept = model.base[:sectors]
        model.base = np.concatenate((kept, np.zeros(sectors - len(kept), np.int32)))
        for layer in model.layers:
            layer.contents = layer.contents[: max(sectors - layer.first, 0)]
            layer.mask = None if layer.mask is None else layer.mask[: len(layer.contents)]
        model.layers = [layer for layer in model.layers if len(layer.contents)]
        return model

    def strangers(self, actual: np.ndarray) -> np.ndarray:
        """Sectors whose content may not be seen."""
        fine = actual == self.base
        if not fine.all():
            for layer in self.layers:
                span = slice(layer.first, layer.first + len(layer.contents))
                same = actual[span] == layer.contents
                fine[span] |= same if layer.mask is None else same & layer.mask
        return np.flatnonzero(~fine)


World = dict[str, DeviceModel]


@dataclass(frozen=True, slots=True, eq=False)
class Begin:
    """Mark: a client sent a change."""

    change: Change


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """Mark: a change was answered. `durable`: with FUA."""

    change: Change
    stage: Stage = Stage.ACKNOWLEDGED
    durable: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class FlushBegin:
    """Mark: a flush was sent; what was acknowledged before is what it is about."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class FlushEnd:
    """Mark: a flush was acknowledged."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class StepBegin:
    """Mark: names or sizes are being changed."""

    step: Step


@dataclass(frozen=True, slots=True, eq=False)
class StepEnd:
    """Mark: that was reported as done, as failed, or (`done` None) it is not known which.

    Not `certain`: the pool shows it so, and what is on the disk may be the other.
    """

    step: Step
    done: bool | None = True
    certain: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Mark: the whole content of a device was read; a snapshot keeps it from now on."""

    device: int
    contents: np.ndarray


@dataclass(frozen=True, slots=True)
class Settled:
    """Mark: what was not certain is; `done`: the step was carried out."""

    done: bool


@dataclass(frozen=True, slots=True)
class Restart:
    """Mark: the pool was opened anew without having been closed well; no later flush is about what came before."""


class Step:
    """One change of names and sizes; `apply` gives the world after it.

    `source` names the device whose content it takes, if any; `taken` is that content: what was acknowledged when
    the step began must be in it, what came later may.
    """

    source: str | None = None

    def __init__(self, text: str) -> None:
        self.text = text

    def apply(self, world: World, taken: DeviceModel | None) -> World:
        raise NotImplementedError


class Oracle:
    """The promises in force, as the marks of a history tell them one after the other."""

    def __init__(self, world: World | None = None) -> None:
        self.world: World = {} if world is None else world
        self._flushes: dict[int, set[int]] = {}
        self._acknowledged: set[int] = set()
        self._step: Step | None = None
        self._taken: DeviceModel | None = None
        self._doubt: tuple[Step, DeviceModel | None, World] | None = None  # with the world before
        self._watched: list[tuple[int, DeviceModel]] = []

    def watch(self, model: DeviceModel) -> DeviceModel:
        """A copy as of now that also gets every change which begins from now on: what a reader may see."""
        copy = model.snapshot(model.number, read_only=True, origin=None)
        self._watched.append((model.number, copy))
        return copy

    def unwatch(self, copy: DeviceModel) -> None:
        self._watched = [watched for watched in self._watched if watched[1] is not copy]

    def hear(self, mark: object) -> bool:
        """Go on by one mark; whether more is promised now, so that the same image may be wrong from here on."""
        match mark:
            case Begin(change):
                self._device(change.device).begin(change)
                for number, copy in self._watched:
                    if number == change.device:
                        copy.begin(change)
            case End(change, stage, durable):
                self._end(change, stage, durable=durable)
            case FlushBegin(number):
                self._flushes[number] = set(self._acknowledged)
            case FlushEnd(number):
                covered = self._flushes.pop(number)
                for device in self.world.values():
                    device.fold(covered)
                self._acknowledged -= covered
            case StepBegin(step):
                self._step = step
                self._taken = None if step.source is None else self.watch(self.world[step.source])
            case StepEnd(step, done, certain):
                if done is None or not certain:
                    self._doubt = step, self._taken, self.world
                elif self._taken is not None:
                    self.unwatch(self._taken)
                if done:
                    self.world = step.apply(self.world, self._taken)
                self._step = self._taken = None
            case Settled(done):
                self._settle(done=done)
            case Restart():
                self._acknowledged.clear()
                for device in self.world.values():
                    for layer in device.layers:
                        layer.stage = Stage.FAILED
            case Seen(number, contents):
                device = self._device(number)
                device.base, device.layers = contents.copy(), []
            case _:
                return False
        if isinstance(mark, End):
            return mark.durable
        return isinstance(mark, FlushEnd | StepEnd | Seen)

    def _settle(self, *, done: bool) -> None:
        assert self._doubt is not None
        step, taken, before = self._doubt
        if done != (self.world is not before):
            self.world = step.apply(before, taken) if done else before
        self._doubt = None
        if taken is not None:
            self.unwatch(taken)

    def _end(self, change: Change, stage: Stage, *, durable: bool) -> None:
        device = self._device(change.device)
        device.settle(change, stage)
        if stage is Stage.ACKNOWLEDGED:
            if durable:
                device.fold({change.number})
            else:
                self._acknowledged.add(change.number)

    def _device(self, number: int) -> DeviceModel:
        return next(device for device in self.world.values() if device.number == number)

    def worlds(self) -> Iterator[World]:
        """What the pool may be now: the world as it was promised, and with the step in flight done."""
        yield self.world
        if self._step is not None:
            yield self._step.apply(self.world, self._taken)
        if self._doubt is not None:
            step, taken, before = self._doubt
            yield step.apply(before, taken) if self.world is before else before
