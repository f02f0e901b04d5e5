"""Devices, snapshots, rollbacks and resizes against an oracle of plain byte arrays, through the device interface.

After every rule the touched device reads as the oracle says, by both ways of reading; at the end every device does,
the metadata passes a full recount, and so does the pool after it was opened again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from metadata import recount
from thinpool.errors import ThinPoolError
from thinpool.exports import PoolExports
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

KIB = 1024
SPANS = st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1))


def read_by_kernel(session, offset: int, length: int) -> bytes:
    """Read through the zero-copy path, letting the kernel copy the slices as a socket would."""
    parts: list = []
    target = os.memfd_create("parts")
    try:
        session.enter()
        session.read(offset, length, parts)
        session.leave()
        os.writev(target, parts)
        session.sent()
        return os.pread(target, length, 0)
    finally:
        os.close(target)


class EngineModel(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize(block=st.sampled_from([64 * KIB, 192 * KIB]), punches=st.booleans())
    def start(self, block: int, punches: bool) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="thinpool-model-"))
        self.block = block
        self.punches = punches
        self.counter = 0
        self.oracle: dict[str, bytearray] = {}
        self.frozen: set[str] = set()
        create_pool(self.root / "pool", size_bytes=512 * block, block_bytes=block)
        self.open()

    def open(self) -> None:
        self.pool = open_pool(PoolLocation.directory(self.root / "pool"))
        self.pool.engine.data.punches = self.punches

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            shutil.rmtree(self.root)

    def session(self, name: str):
        export = PoolExports(self.pool).find(name)
        assert export is not None
        return export.open()

    def span(self, name: str, span: tuple[float, float]) -> tuple[int, int]:
        size = len(self.oracle[name])
        offset = int(span[0] * size)
        return offset, int(span[1] * (size - offset))

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    @rule(target=names, blocks=st.integers(1, 8), odd=st.sampled_from([0, 1, 512, 4096, 65535]))
    def create(self, blocks: int, odd: int) -> str:
        name = self.fresh("dev")
        self.pool.create_device(name, blocks * self.block + odd)
        self.oracle[name] = bytearray(blocks * self.block + odd)
        return name

    @rule(
        name=names,
        span=SPANS,
        seed=st.integers(0, 255),
        align=st.booleans(),
        length=st.sampled_from([0, 4096]),
    )
    def write(self, name: str, span: tuple[float, float], seed: int, align: bool, length: int) -> None:
        if name in self.frozen:
            return
        offset, most = self.span(name, span)
        if align:
            offset -= offset % self.block
        most = min(length, most) if length else most
        data = bytes((seed + i) & 255 for i in range(256)) * (most // 256 + 1)
        session = self.session(name)
        session.enter()
        session.write(offset, memoryview(data)[:most])
        session.leave()
        session.sent()
        self.oracle[name][offset : offset + most] = data[:most]
        self.compare(name, session)

    @rule(name=names, span=SPANS)
    def trim(self, name: str, span: tuple[float, float]) -> None:
        if name in self.frozen:
            return
        offset, length = self.span(name, span)
        session = self.session(name)
        session.trim(offset, length)
        size = len(self.oracle[name])
        begin = -(-offset // self.block) * self.block
        end = offset + length
        end = end if end == size else end // self.block * self.block
        if begin < end:
            self.oracle[name][begin:end] = bytes(end - begin)
        self.compare(name, session)

    @rule(name=names, span=SPANS, keep=st.booleans())
    def zero(self, name: str, span: tuple[float, float], keep: bool) -> None:
        if name in self.frozen:
            return
        offset, length = self.span(name, span)
        session = self.session(name)
        session.zero(offset, length, keep_allocated=keep, fast_only=False)
        self.oracle[name][offset : offset + length] = bytes(length)
        if keep and length:
            assert {kind for _, kind in session.extents(offset, length)} == {1}
        self.compare(name, session)

    @rule(
        target=names, origin=names, read_only=st.booleans(), more=st.sampled_from([0, 0, 0, 1, 512, 70_000])
    )
    def snapshot(self, origin: str, read_only: bool, more: int) -> str:
        name = self.fresh("snap")
        size = len(self.oracle[origin]) + more
        self.pool.create_snapshot(origin, name, read_only=read_only, size_bytes=size if more else None)
        self.oracle[name] = self.oracle[origin] + bytes(more)
        self.compare(name, self.session(name))
        if read_only:
            self.frozen.add(name)
        return name

    @rule(target=names, name=names, snapshot=names, keep=st.booleans())
    def rollback(self, name: str, snapshot: str, keep: bool):
        if name == snapshot:
            with pytest.raises(ThinPoolError):
                self.pool.rollback(name, snapshot)
            return multiple()
        kept = self.fresh("kept")
        self.pool.rollback(name, snapshot, keep=kept if keep else False)
        if keep:
            self.oracle[kept] = self.oracle[name]
            self.frozen.add(kept)
        self.oracle[name] = bytearray(self.oracle[snapshot])
        self.compare(name, self.session(name))
        return kept if keep else multiple()

    @rule(name=consumes(names))
    def delete(self, name: str) -> None:
        self.pool.delete(name)
        del self.oracle[name]
        self.frozen.discard(name)

    @rule(target=names, name=consumes(names))
    def rename(self, name: str) -> str:
        new = self.fresh("renamed")
        self.pool.rename(name, new)
        self.oracle[new] = self.oracle.pop(name)
        if name in self.frozen:
            self.frozen.remove(name)
            self.frozen.add(new)
        return new

    @rule(one=names, other=names)
    def exchange(self, one: str, other: str) -> None:
        traded = {one: other, other: one}
        origins = {info.name: info.origin for info in self.pool.devices()}
        self.pool.rename(one, other, exchange=True)
        self.oracle = {traded.get(name, name): content for name, content in self.oracle.items()}
        self.frozen = {traded.get(name, name) for name in self.frozen}
        for info in self.pool.devices():
            before = origins[traded.get(info.name, info.name)]
            assert info.origin == (None if before is None else traded.get(before, before))
        self.compare(one, self.session(one))
        self.compare(other, self.session(other))

    @rule(name=names, change=st.integers(-300_000, 300_000))
    def resize(self, name: str, change: int) -> None:
        size = max(1, len(self.oracle[name]) + change)
        if name in self.frozen and change < 0:
            return
        self.pool.resize(name, size, shrink=True)
        content = self.oracle[name]
        self.oracle[name] = content[:size] + bytes(max(0, size - len(content)))
        self.compare(name, self.session(name))

    @rule()
    def grow(self) -> None:
        if self.pool.status().data_bytes < 4096 * self.block:
            self.pool.grow(self.pool.status().data_bytes + 3 * self.block)

    @rule()
    def commit(self) -> None:
        self.pool.commit()
        self.pool.engine.reclaim()

    @rule()
    def reopen(self) -> None:
        self.pool.close()
        self.open()
        self.compare_all()

    @invariant()
    def names_agree(self) -> None:
        if hasattr(self, "pool"):
            assert {info.name for info in self.pool.devices()} == set(self.oracle)

    @invariant()
    def nothing_leaks(self) -> None:
        """Every data block is free, in use, or on its way back."""
        if not hasattr(self, "pool"):
            return
        self.pool.commit()
        engine = self.pool.engine
        engine.reclaim()
        assert engine.reclaimer.waiting_blocks == 0
        assert engine.free.free_blocks == engine.metadata.data_blocks - engine.metadata.data_blocks_allocated
        assert not recount(engine.metadata)

    def compare(self, name: str, session) -> None:
        want = bytes(self.oracle[name])
        try:
            assert session.read_bytes(0, len(want)) == want
            assert read_by_kernel(session, 0, len(want)) == want
            extents = session.extents(0, len(want))
            assert sum(length for length, _ in extents) == len(want)
        finally:
            session.close()

    def compare_all(self) -> None:
        for name in self.oracle:
            self.compare(name, self.session(name))


TestEngineModel = EngineModel.TestCase
TestEngineModel.settings = settings(
    max_examples=int(os.environ.get("THINPOOL_EXAMPLES", "40")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="THINPOOL_EXAMPLES" not in os.environ,
)
