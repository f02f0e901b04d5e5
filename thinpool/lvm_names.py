"""Names and sizes for the devices of a bare pool, which records ids only.

In: the two files that `--names` takes, told apart by what is in them: the text that LVM keeps of a volume group
(`vgcfgbackup -f FILE`, or /etc/lvm/backup/VG), and plain lines `ID NAME [SIZE]`. Out: the grammar of LVM's text
(`lvm_config.py`), and what is done with the names (`opening.py`).

A volume group may have several thin pools with the same device ids. The one meant is the one whose device ids are those
of the metadata; where that is not enough to tell, the file is given as `FILE:POOL`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadSize, NamesUnusable
from .lvm_config import BadConfig, parse_config
from .names import check_name
from .units import parse_size

SECTOR_BYTES = 512
DEVICE_ID_MAX = (1 << 24) - 1
FILE_BYTES_MAX = 16 << 20
PLAIN_WORDS = (2, 3)


@dataclass(frozen=True, slots=True)
class NamedDevice:
    """A device as a names file tells it. `size_bytes` None: as long as its last mapping says."""

    device_id: int
    name: str
    size_bytes: int | None = None
    read_only: bool = False
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class LvmPool:
    """A thin pool of a volume group: the transaction id LVM expects, and its devices."""

    name: str
    transaction_id: int
    devices: Sequence[NamedDevice]

    @property
    def ids(self) -> AbstractSet[int]:
        """Ids of all its devices."""
        return {device.device_id for device in self.devices}


def read_names(path: Path, present: AbstractSet[int]) -> list[NamedDevice]:
    """Names for the devices `present` in a pool; those the file says of others are left out.

    `path` may end in `:POOL`. Raises NamesUnusable, BadName, OSError.
    """
    pool: str | None = None
    if not path.exists() and ":" in path.name:
        name, _, pool = path.name.rpartition(":")
        path = path.with_name(name)
    text = _text(path)
    if "logical_volumes" in text:
        devices = _choose(path, lvm_pools(path, text), pool, present).devices
    elif pool is not None:
        raise NamesUnusable(str(path), f"it describes no volume group, so no pool {pool}")
    else:
        devices = list(_plain(path, text))
    found = [device for device in devices if device.device_id in present]
    _check(path, found)
    return found


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise NamesUnusable(str(path), "it is too long for a file of names")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise NamesUnusable(str(path), "it is not text in UTF-8") from error


def _check(path: Path, devices: Sequence[NamedDevice]) -> None:
    ids, names = set[int](), set[str]()
    for device in devices:
        check_name(device.name)
        if device.device_id in ids:
            raise NamesUnusable(str(path), f"it names device {device.device_id} twice")
        if device.name in names:
            raise NamesUnusable(str(path), f"it gives the name {device.name} to two devices")
        ids.add(device.device_id)
        names.add(device.name)


def _plain(path: Path, text: str) -> Iterator[NamedDevice]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in PLAIN_WORDS or not (words[0].isascii() and words[0].isdecimal()):
            raise NamesUnusable(str(path), f"line {number} is not ID NAME [SIZE]")
        if int(words[0]) > DEVICE_ID_MAX:
            raise NamesUnusable(str(path), f"line {number}: device ids go up to {DEVICE_ID_MAX}")
        try:
            size_bytes = parse_size(words[2]) if len(words) == max(PLAIN_WORDS) else None
        except BadSize as error:
            raise NamesUnusable(str(path), f"line {number}: {error}") from error
        yield NamedDevice(int(words[0]), words[1], size_bytes)


# --- LVM's text ---


def lvm_pools(path: Path, text: str) -> list[LvmPool]:
    """All thin pools of a volume group, by name. Raises NamesUnusable."""
    try:
        config = parse_config(text)
        groups = [value for value in config.values() if isinstance(value, Mapping) and "extent_size" in value]
        return [pool for group in groups for pool in _pools_of(group)]
    except BadConfig as error:
        raise NamesUnusable(str(path), str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NamesUnusable(str(path), f"it is not as LVM writes it ({error})") from error


def _pools_of(group: Mapping[str, Any]) -> Iterator[LvmPool]:
    extent_bytes = int(group["extent_size"]) * SECTOR_BYTES
    volumes: Mapping[str, Any] = group.get("logical_volumes", {})
    first_segments = {name: volume.get("segment1", {}) for name, volume in volumes.items()}
    for name in sorted(volumes):
        if first_segments[name].get("type") == "thin-pool":
            devices = [
                _device(volume_name, volumes[volume_name], segment, extent_bytes)
                for volume_name, segment in first_segments.items()
                if segment.get("type") == "thin" and segment.get("thin_pool") == name
            ]
            yield LvmPool(name, int(first_segments[name]["transaction_id"]), devices)


def _device(
    name: str, volume: Mapping[str, Any], segment: Mapping[str, Any], extent_bytes: int
) -> NamedDevice:
    extents = sum(
        int(part["extent_count"])
        for key, part in volume.items()
        if key.startswith("segment") and key != "segment_count"
    )
    return NamedDevice(
        device_id=int(segment["device_id"]),
        name=name,
        size_bytes=extents * extent_bytes,
        read_only="WRITE" not in volume["status"],
        origin=segment.get("origin"),
    )


def _choose(path: Path, pools: Sequence[LvmPool], wanted: str | None, present: AbstractSet[int]) -> LvmPool:
    if wanted is not None:
        for pool in pools:
            if pool.name == wanted:
                return pool
        raise NamesUnusable(str(path), f"its volume group has no thin pool {wanted}")
    if not pools:
        raise NamesUnusable(str(path), "its volume group has no thin pool")
    fitting = pools if len(pools) == 1 else [pool for pool in pools if pool.ids == present]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(pool.name for pool in pools)
    raise NamesUnusable(str(path), f"it may mean any of the thin pools {names}; say which with FILE:POOL")
