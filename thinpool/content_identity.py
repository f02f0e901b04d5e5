"""Who a device is, and what it holds: the two identities that snapshots carry when they travel.

In: how both are made. Out: where they are kept (`catalog_rows.py`), what they are compared for (`receiving.py`).

A device's *uuid* is given once and stays through renames, resizes and rollbacks. Its *content id* names one content:
devices that have the same content id hold the same bytes, in whatever pool they are. A device has one as long as nobody
may have written to it, so a read-only snapshot has one for ever, and a writable device loses it when a client opens it.
A received device takes over the content id of its source; that is how an increment finds its base, and how a base
that was changed is told from one that was not. As with the guid of a ZFS snapshot, it is a random number and no hash:
it says "this is that", and the checksums of the stream say that the bytes arrived.

Pools without a catalogue (LVM's) and catalogues of the first version derive both from what they have, so that they are
the same at every opening.
"""

from __future__ import annotations

import uuid

from metadata import PoolMetadata

# Names this program's derived identities, as RFC 9562 5.5 asks; made once with uuid4.
NAMESPACE = uuid.UUID("6d2c1c0e-5c0b-4f5f-9a0f-2f3c6a1c7d11")


def new_identity() -> str:
    """A fresh random uuid, for a device or a content."""
    return str(uuid.uuid4())


def derived_identity(*facts: object) -> str:
    """The identity that follows from facts: the same facts give the same one."""
    return str(uuid.uuid5(NAMESPACE, "\0".join(str(fact) for fact in facts)))


def identity_of_unnamed(metadata: PoolMetadata, device_id: int) -> str:
    """The uuid of a device that no catalogue knows. Raises NoSuchDevice."""
    record = metadata.device(device_id)
    return derived_identity(
        "device", metadata.uuid.hex(), device_id, record.transaction_id, record.creation_time
    )


def frozen_content_id(device_uuid: str, *, read_only: bool) -> str | None:
    """The content id of a device that always was read-only: it has had one content only."""
    return derived_identity("content", device_uuid) if read_only else None
