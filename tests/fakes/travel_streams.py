"""A snapshot from host to host in a stream, with the model of what arrives made from the records of the stream."""

from __future__ import annotations

import random

from tests.fakes.device_model import ModelDevice
from tests.fakes.transfer_pools import boundaries, stream_of, take_in
from tests.fakes.travel_hosts import Host
from thinpool.stream_format import HEADER_BYTES, RecordHeader, RecordKind


def travel(source: Host, name: str, target: Host, made: str, chance: random.Random) -> str | None:
    """Send a snapshot, on top of a base that both hosts have where there is one; returns the base's name."""
    bases = [other for other in source.names(writable=False, lazy=False) if _there(source, other, target)]
    base = chance.choice([None, *bases]) if bases else None
    found = _there(source, base, target) if base is not None else None
    stream = stream_of(source.pool, name, base, level=chance.choice([0, 1]))
    model = source.models[name]
    arrived = ModelDevice(model.size_bytes, target.block_bytes)
    if found is not None:
        arrived = target.models[found].copy()
        arrived.resize(model.size_bytes)
    places = boundaries(stream)
    for place in places[:-1]:
        header = RecordHeader.decode(stream[place : place + HEADER_BYTES])
        if header.kind == RecordKind.DATA:
            arrived.write(header.offset_bytes, model.read(header.offset_bytes, header.length_bytes))
        elif header.kind == RecordKind.HOLE:
            arrived.zero(header.offset_bytes, header.length_bytes, keep=False)
    arrived.settle()
    take_in(target.pool, stream, made)
    target.models[made] = arrived
    target.settle()
    return base


def _there(source: Host, name: str, target: Host) -> str | None:
    content_id = source.entry(name).content_id
    return None if content_id is None else target.named(content_id)
