"""What is measured: every workload with its state, its client, its peers and its targets, as data."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from enum import Enum

OURS = "thinpool"
NBDKIT, NBDKIT_COW = "nbdkit file", "nbdkit file+cow"
QEMU_RAW, QCOW2 = "qemu-nbd raw", "qemu-nbd qcow2"
NBD_SERVER = "nbd-server"
PUMP = "bare pump"  # no server: what client and socket cost without a file behind them
ALL_SERVERS = (OURS, NBDKIT, NBDKIT_COW, QEMU_RAW, QCOW2, NBD_SERVER, PUMP)
RAW_PEERS = (NBDKIT, QEMU_RAW, QCOW2, NBD_SERVER, PUMP)
TLS_PEERS = (NBDKIT, QEMU_RAW)
THIN_PEERS = (NBDKIT_COW, QCOW2)


class State(Enum):
    """What the export holds when a round begins."""

    FILLED = "filled"  # written once from end to end through the server, in 64 KiB writes
    FILLED_LARGE = "filled with 1 MiB writes"
    COLD = "filled, page cache dropped"  # needs root
    FRESH = "fresh"  # nothing was ever written; made anew before each round
    SNAPSHOT = "snapshot"  # filled, and a snapshot (overlay, cow layer) was just made; anew before each round
    DEPTH_1 = "depth 1"
    DEPTH_10 = "depth 10"
    DEPTH_100 = "depth 100"
    DEPTH_1000 = "depth 1000"
    TENTH = "100 GiB, a tenth of it written"
    TLS = "filled, over TLS"

    @property
    def used_up(self) -> bool:
        """Whether a round changes the state, so that the next one must make it again."""
        return self in (State.FRESH, State.SNAPSHOT, State.COLD)

    @property
    def depth(self) -> int:
        """Number of snapshots under the device; 0 where the state is not about that."""
        return int(self.value.split()[1]) if self.value.startswith("depth") else 0


class Client(Enum):
    """Who sends the requests."""

    FIO = "fio"
    NBDCOPY_OUT = "nbdcopy out"
    NBDCOPY_IN = "nbdcopy in"
    QEMU_IMG_READ = "qemu-img bench read"
    QEMU_IMG_WRITE = "qemu-img bench write"


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the matrix. ``target`` maps a peer to the least ratio ours must reach against it."""

    name: str
    title: str
    state: State = State.FILLED
    client: Client = Client.FIO
    fio: tuple[str, ...] = ()
    # Whole passes (each block once) instead of a fixed time: first writes exist only once.
    one_pass: bool = False
    first_touch: bool = False
    in_bytes: bool = False  # report MB/s instead of requests a second
    peers: tuple[str, ...] = RAW_PEERS
    targets: dict[str, float] = field(default_factory=dict)
    step_1: bool = False


def _random(kind: str, depth: int, *more: str) -> tuple[str, ...]:
    return (f"--rw=rand{kind}", "--bs=4k", f"--iodepth={depth}", "--norandommap", *more)


def _sequential(kind: str, size: str, depth: int) -> tuple[str, ...]:
    return (f"--rw={kind}", f"--bs={size}", f"--iodepth={depth}")


# Every 64 KiB block is touched exactly once, at its beginning and in random order (fio replays a list that clients.py
# writes: its own --blockalign repeats blocks). What is measured is the first touch.
_FIRST_TOUCH_4K = ("--rw=randwrite", "--bs=4k", "--iodepth=32")
_MIXED = ("--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32", "--norandommap")


BASIC = [
    Workload(
        "read-4k-1",
        "4 KiB random read, depth 1",
        fio=_random("read", 1),
        targets={NBDKIT: 1.6, QCOW2: 2.5},
        step_1=True,
    ),
    Workload(
        "read-4k-32",
        "4 KiB random read, depth 32",
        fio=_random("read", 32),
        targets={NBDKIT: 1.8, QCOW2: 4.5},
        step_1=True,
    ),
    Workload(
        "write-4k-1",
        "4 KiB random write, depth 1",
        fio=_random("write", 1),
        targets={NBDKIT: 1.5, QCOW2: 2.5},
        step_1=True,
    ),
    Workload(
        "write-4k-32",
        "4 KiB random write, depth 32",
        fio=_random("write", 32),
        targets={NBDKIT: 1.1, QCOW2: 2.5},
        step_1=True,
    ),
    Workload(
        "read-1m",
        "1 MiB read, depth 8",
        fio=_sequential("read", "1m", 8),
        in_bytes=True,
        targets={NBDKIT: 1.2, QCOW2: 2.5},
        step_1=True,
    ),
    Workload(
        "write-1m",
        "1 MiB write, depth 8",
        fio=_sequential("write", "1m", 8),
        in_bytes=True,
        targets={NBDKIT: 1.0, QCOW2: 2.0},
        step_1=True,
    ),
    Workload("read-128k", "128 KiB read, depth 8", fio=_sequential("read", "128k", 8), in_bytes=True),
    Workload("write-128k", "128 KiB write, depth 8", fio=_sequential("write", "128k", 8), in_bytes=True),
    Workload("mixed-4k", "4 KiB 70/30 mixed, depth 32", fio=_MIXED),
    Workload(
        "mixed-4k-4",
        "4 KiB 70/30 mixed, depth 32, 4 connections",
        fio=(*_MIXED, "--numjobs=4"),
        targets={NBDKIT: 1.3, QCOW2: 2.5},
    ),
    Workload(
        "read-4k-4", "4 KiB random read, depth 32, 4 connections", fio=_random("read", 32, "--numjobs=4")
    ),
    Workload(
        "write-4k-4",
        "4 KiB random write, depth 32, 4 connections",
        fio=_random("write", 32, "--numjobs=4"),
    ),
    Workload(
        "write-flush",
        "4 KiB write + flush each, depth 1",
        fio=_random("write", 1, "--fsync=1"),
        targets={NBDKIT: 0.9, QCOW2: 1.5},
    ),
]


PAGE_CACHE = [
    Workload(
        f"{kind}-4k-32-{tag}",
        f"4 KiB random {kind}, depth 32 ({state.value})",
        state,
        fio=_random(kind, 32),
    )
    for state, tag in ((State.FILLED_LARGE, "large"), (State.COLD, "cold"))
    for kind in ("read", "write")
]


THIN = [
    Workload(
        "first-64k",
        "first write into unmapped, 64 KiB sequential",
        State.FRESH,
        fio=_sequential("write", "64k", 8),
        one_pass=True,
        in_bytes=True,
        peers=(NBDKIT, *THIN_PEERS),
        targets={NBDKIT_COW: 1.5, QCOW2: 2.0},
    ),
    Workload(
        "first-4k",
        "first write into unmapped, 4 KiB random, depth 32",
        State.FRESH,
        fio=_FIRST_TOUCH_4K,
        one_pass=True,
        first_touch=True,
        peers=(NBDKIT, *THIN_PEERS),
    ),
    Workload(
        "snapshot-4k",
        "first 4 KiB write after a snapshot, depth 32",
        State.SNAPSHOT,
        fio=_FIRST_TOUCH_4K,
        one_pass=True,
        first_touch=True,
        peers=THIN_PEERS,
        targets={NBDKIT_COW: 3.0, QCOW2: 3.0},
    ),
    Workload(
        "snapshot-64k",
        "first 64 KiB write after a snapshot, depth 8",
        State.SNAPSHOT,
        fio=("--rw=randwrite", "--bs=64k", "--iodepth=8"),
        one_pass=True,
        in_bytes=True,
        peers=THIN_PEERS,
    ),
    Workload(
        "sparse-read",
        "1 MiB read of a device never written",
        State.FRESH,
        fio=_sequential("read", "1m", 8),
        in_bytes=True,
    ),
    *[
        Workload(
            f"read-{state.value.replace(' ', '-')}",
            f"4 KiB random read, depth 32, {state.depth} snapshots below",
            state,
            fio=_random("read", 32),
            peers=(QCOW2,),
        )
        for state in (State.DEPTH_1, State.DEPTH_10, State.DEPTH_100, State.DEPTH_1000)
    ],
]


CLIENTS = [
    Workload("nbdcopy-out", "nbdcopy, whole device out", client=Client.NBDCOPY_OUT, in_bytes=True),
    Workload("nbdcopy-in", "nbdcopy, whole device in", client=Client.NBDCOPY_IN, in_bytes=True),
    Workload(
        "nbdcopy-tenth",
        "nbdcopy of a 100 GiB device, a tenth full",
        State.TENTH,
        client=Client.NBDCOPY_OUT,
        in_bytes=True,
        peers=(QCOW2,),
        targets={QCOW2: 1.5},
    ),
    Workload("qemu-img-read", "qemu-img bench, 4 KiB read, depth 32", client=Client.QEMU_IMG_READ),
    Workload("qemu-img-write", "qemu-img bench, 4 KiB write, depth 32", client=Client.QEMU_IMG_WRITE),
]


TLS = [
    Workload(
        "tls-read-4k-1", "4 KiB random read, depth 1, TLS", State.TLS, fio=_random("read", 1), peers=TLS_PEERS
    ),
    Workload(
        "tls-read-4k-32",
        "4 KiB random read, depth 32, TLS",
        State.TLS,
        fio=_random("read", 32),
        peers=TLS_PEERS,
    ),
    Workload(
        "tls-write-4k-32",
        "4 KiB random write, depth 32, TLS",
        State.TLS,
        fio=_random("write", 32),
        peers=TLS_PEERS,
    ),
    Workload(
        "tls-read-1m",
        "1 MiB read, depth 8, TLS",
        State.TLS,
        fio=_sequential("read", "1m", 8),
        in_bytes=True,
        peers=TLS_PEERS,
    ),
    Workload(
        "tls-write-1m",
        "1 MiB write, depth 8, TLS",
        State.TLS,
        fio=_sequential("write", "1m", 8),
        in_bytes=True,
        peers=TLS_PEERS,
    ),
]


WORKLOADS: tuple[Workload, ...] = (*BASIC, *PAGE_CACHE, *THIN, *CLIENTS, *TLS)


def select(names: str | None) -> list[Workload]:
    """Return the workloads named by a comma-separated list (``step1`` is a group, ``*`` matches); None is all."""
    if names is None:
        return list(WORKLOADS)
    chosen: list[Workload] = []
    for pattern in names.split(","):
        found = [
            workload
            for workload in WORKLOADS
            if (workload.step_1 if pattern == "step1" else fnmatch.fnmatch(workload.name, pattern))
        ]
        if not found:
            message = f"no cell is called {pattern!r}; there are: {', '.join(workload.name for workload in WORKLOADS)}"
            raise ValueError(message)
        chosen += [workload for workload in found if workload not in chosen]
    return chosen
