"""Which device is sent, and how it is kept as it is meanwhile, wherever the pool is.

In: choosing device and base by name or by a token, freezing what clients may change, holds in the server's pool, the
source as a command gets it. Out: reading the source (`snapshot_source.py`), the stream (`sending.py`).

A pool that nobody serves is locked by the command for as long as it reads: nothing can change. In a served pool the
server holds the device (it cannot be deleted, shrunk or replaced) for as long as the command keeps its connection open;
a device that clients may write to is frozen in a snapshot of its own first, which goes when the connection does. Server
and command share a machine and the pool's files, so the data itself never passes through the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .catalog_rows import CatalogEntry
from .common_bases import KnownBase, related
from .errors import BaseGone, BaseNotFrozen, ContentGone, NoSuchDevice
from .receiving_state import ResumeToken
from .snapshot_source import SnapshotSource, SourceDevice
from .transfers import is_temporary

if TYPE_CHECKING:
    from .pool import Pool

BASES_NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What to send: a device by name, perhaps on top of a base; or what a token asks for."""

    name: str = ""
    base: str | None = None
    token: str | None = None


@dataclass(frozen=True, slots=True)
class HeldDevices:
    """Device and base, held; `entries` are what to release and `copies` what to delete in the end."""

    device: SourceDevice
    base: SourceDevice | None
    block_bytes: int
    start_bytes: int
    held_ids: list[int]
    copies: list[str]
    bases: list[KnownBase]

    def to_json(self) -> dict[str, Any]:
        """For the control API."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> HeldDevices:
        """Back from the control API."""
        base = document["base"]
        fields = {
            **document,
            "device": SourceDevice(**document["device"]),
            "base": None if base is None else SourceDevice(**base),
            "bases": [KnownBase(**known) for known in document["bases"]],
        }
        return cls(**fields)


def chosen(pool: Pool, request: SourceRequest) -> tuple[CatalogEntry, CatalogEntry | None, int]:
    """The device, its base, and where to begin.

    Raises NoSuchDevice, BaseGone, BaseNotFrozen, ContentGone, TokenInvalid.
    """
    if request.token is not None:
        token = ResumeToken.from_text(request.token)
        device = _holder(pool, "device", token.content_id)
        base = None if token.base_content_id is None else _holder(pool, "base", token.base_content_id)
        return device, base, token.position_bytes
    device = _named(pool, request.name)
    if request.base is None:
        return device, None, 0
    base = pool.catalog.by_name(request.base)
    if base is None or base.receiving is not None:
        others = [known.name for known in related(device, _others(pool))]
        raise BaseGone(request.base, str(pool.location), others[:BASES_NAMED_MAX])
    if base.content_id is None:
        raise BaseNotFrozen(base.name)
    return device, base, 0


def _others(pool: Pool) -> list[CatalogEntry]:
    """Devices that could be a base of something."""
    return [entry for entry in pool.catalog.entries() if entry.receiving is None and not is_temporary(entry)]


def _named(pool: Pool, name: str) -> CatalogEntry:
    entry = pool.catalog.by_name(name)
    if entry is None or entry.receiving is not None:
        raise NoSuchDevice(name, str(pool.location))
    return entry


def _holder(pool: Pool, what: str, content_id: str) -> CatalogEntry:
    for entry in pool.catalog.entries():
        if entry.content_id == content_id and entry.receiving is None:
            return entry
    raise ContentGone(what, content_id)


def hold(pool: Pool, request: SourceRequest) -> HeldDevices:
    """Hold device and base in an open pool, frozen where clients may change them. `release` ends it."""
    with pool.engine.transaction:
        device, base, start_bytes = chosen(pool, request)
        for entry in (device, base):
            if entry is not None:
                pool.lazy.require_whole(entry)
        copies: list[str] = []

        def frozen(entry: CatalogEntry) -> CatalogEntry:
            if entry.read_only or not pool.writable:
                return entry
            copy = pool.transfers.frozen_copy(entry)
            copies.append(copy.name)
            # The stream is about the device, and the copy is gone when it is received.
            return replace(copy, name=entry.name, uuid=entry.uuid)

        held = frozen(device)
        held_base = None if base is None else frozen(base)
        if pool.writable:
            pool.commit()  # the trees that are read from the file must be in it
        devices = [entry for entry in (held, held_base) if entry is not None]
        ids = [entry.device_id for entry in devices]
        described = [_described(pool, entry) for entry in devices]
        pool.transfers.hold(ids)
    return HeldDevices(
        device=described[0],
        base=described[1] if held_base is not None else None,
        block_bytes=pool.block_bytes,
        start_bytes=start_bytes,
        held_ids=ids,
        copies=copies,
        bases=[]
        if base is None
        else [known for known in related(device, _others(pool)) if known.name != base.name],
    )


def _described(pool: Pool, entry: CatalogEntry) -> SourceDevice:
    return SourceDevice(
        name=entry.name,
        size_bytes=entry.size_bytes,
        uuid=entry.uuid,
        content_id=entry.content_id,
        read_only=entry.read_only,
        root=pool.engine.metadata.device_root(entry.device_id),
        device_id=entry.device_id,
    )


def release(pool: Pool, held: HeldDevices) -> None:
    """End a hold, and delete the snapshots that were made for it."""
    pool.transfers.release(held.held_ids)
    for name in held.copies:
        pool.delete(name)


@contextmanager
def held_here(pool: Pool, request: SourceRequest) -> Iterator[tuple[SnapshotSource, int]]:
    """The source in a pool that this process has open, and where its stream begins."""
    held = hold(pool, request)
    try:
        source = SnapshotSource(
            (pool.location.metadata_path, pool.location.data_path),
            held.block_bytes,
            (held.device, held.base),
            lambda: None,
            held.bases,
        )
        try:
            yield source, held.start_bytes
        finally:
            source.close()
    finally:
        release(pool, held)
