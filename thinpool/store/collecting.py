"""The collector: deletes packs that no snapshot, push or pull needs. Safe beside all of them, and beside itself.

In: the two phases, and what else is swept up. Out: why it is safe (`store.py` has the protocol).

    1. List the packs. Then read the roots: pushes in flight first, then snapshots, then holds. A push writes its
       snapshot before it removes its intent, and a hold is checked against its snapshot after it was written, so
       whatever is missed in one place is seen in the next. A pack that no root names and no intent shields is
       condemned.
    2. After the grace period: read the roots again. A condemned pack that none names is deleted, then its mark.

The grace period is not what makes it safe; it is for stores whose listings lag behind. Ages are taken from the store's
own clock alone, never from that of a host. An intent that was not renewed for a day belongs to a push that died; should
that push wake up again, it finds its packs condemned or gone and sends them anew.

In a store that is full, no mark can be written either. What is ripe goes first then, and makes room for marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from thinpool.errors import StoreFull

from .manifests import Manifest
from .objects import Listed
from .segments import PACK_ID_BYTES
from .store import CONDEMNED, HOLDS, INDEX, PENDING, Store

GRACE_SECONDS = 3600.0
LEASE_SECONDS = 86400.0
SWEEP_SECONDS_MIN = 1.0  # dates of a second's resolution say no less
PUSH_BYTES = PACK_ID_BYTES - 4


@dataclass(slots=True)
class CollectReport:
    """What a collection found and did."""

    snapshots: int = 0
    pushes: int = 0
    pulls: int = 0
    packs: int = 0
    condemned: int = 0
    deleted: int = 0
    freed_bytes: int = 0
    waiting_bytes: int = 0
    pushes_given_up: int = 0
    pulls_given_up: int = 0
    unfinished_writes: int = 0


@dataclass(slots=True)
class _Roots:
    needed: set[bytes]
    shielded: set[bytes]
    report: CollectReport


def collect(
    store: Store,
    *,
    grace_seconds: float = GRACE_SECONDS,
    lease_seconds: float = LEASE_SECONDS,
    pull_seconds: float = math.inf,
) -> CollectReport:
    """Collect: packs that nobody needs, intents older than a lease, holds of pulls that began so long ago.

    Raises StoreDamaged where a root cannot be read: then nothing is deleted. Raises StoreFull where there is no room
    for a single mark and nothing could be deleted.
    """
    now = store.objects.now()
    packs = store.packs()
    roots = _roots(store, now, lease_seconds)
    report = roots.report
    report.packs = len(packs)
    full = _condemn(store, packs, roots)
    _delete(store, grace_seconds, report)
    _sweep(store, now, (grace_seconds, lease_seconds, pull_seconds), report)
    room = report.condemned + report.deleted + report.pushes_given_up + report.unfinished_writes
    if full is not None and not room:
        raise full
    return report


def _condemn(store: Store, packs: dict[bytes, Listed], roots: _Roots) -> StoreFull | None:
    """Phase one. Returns the error of a store that has no room for a mark; later runs mark the rest."""
    condemned, report = store.condemned(), roots.report
    for pack, listed in packs.items():
        if pack not in roots.needed and pack[:PUSH_BYTES] not in roots.shielded and pack not in condemned:
            try:
                store.condemn(pack)
            except StoreFull as error:
                return error
            report.condemned += 1
            report.waiting_bytes += listed.size_bytes
    return None


def _delete(store: Store, grace_seconds: float, report: CollectReport) -> None:
    """Phase two. The marks are listed before the roots: each was there before the roots it is held against."""
    condemned = store.condemned()
    if not condemned:
        return
    now = store.objects.now()
    ripe = {pack for pack, listed in condemned.items() if now - listed.modified >= grace_seconds}
    if not ripe:
        return
    needed = _roots(store, now, float("inf")).needed
    packs = store.packs()
    doomed = {pack for pack in ripe if pack not in needed and pack in packs}
    store.objects.delete([packs[pack].key for pack in doomed])
    # Only now the marks, also those that an interrupted collection left behind.
    store.objects.delete([_mark(pack) for pack in ripe if pack in doomed or pack not in packs])
    report.deleted = len(doomed)
    report.freed_bytes = sum(packs[pack].size_bytes for pack in doomed)
    report.waiting_bytes = sum(
        packs[pack].size_bytes
        for pack in condemned
        if pack in packs and pack not in needed and pack not in doomed
    )


def _mark(pack: bytes) -> str:
    return CONDEMNED + pack.hex()


def _roots(store: Store, now: float, lease_seconds: float) -> _Roots:
    """Everything that keeps packs, in the order that misses nothing."""
    report = CollectReport()
    needed: set[bytes] = set()
    shielded: set[bytes] = set()
    for listed in store.objects.list(PENDING):
        pending = store.read_pending(listed.key)
        if pending is None:
            continue
        if pending.manifest is not None:
            needed.update(pending.manifest.packs)
        if now - listed.modified < lease_seconds:
            report.pushes += 1
            shielded.update(map(bytes.fromhex, (listed.key.removeprefix(PENDING), *pending.shields)))
    report.snapshots = _need(needed, (manifest for _, manifest in store.manifests()))
    report.pulls = _need(needed, (manifest for _, manifest in store.held()))
    return _Roots(needed, shielded, report)


def _need(needed: set[bytes], manifests: Iterable[Manifest]) -> int:
    count = 0
    for manifest in manifests:
        needed.update(manifest.packs)
        count += 1
    return count


def _sweep(store: Store, now: float, ages: tuple[float, float, float], report: CollectReport) -> None:
    """What dead processes left: intents, holds if asked to, indices of which no pack is left, unfinished writes.

    `ages`: grace period, lease of pushes, lease of pulls, in seconds.
    """
    grace, lease, pulls = ages
    dead = [item.key for item in store.objects.list(PENDING) if now - item.modified >= lease]
    # The intent goes a grace period before its packs can: they are condemned by a later collection.
    store.objects.delete(dead)
    report.pushes_given_up = len(dead)
    if pulls < math.inf:
        held = [item.key for item in store.objects.list(HOLDS) if now - item.modified >= pulls]
        store.objects.delete(held)
        report.pulls_given_up = len(held)
    grace = max(grace, SWEEP_SECONDS_MIN)
    indices = [item for item in store.objects.list(INDEX) if now - item.modified >= grace]
    if indices:
        alive = {pack[:PUSH_BYTES].hex() for pack in store.packs()}
        store.objects.delete(
            [item.key for item in indices if item.key.removeprefix(INDEX).split("-")[0] not in alive]
        )
    report.unfinished_writes = store.objects.sweep(now - grace)
