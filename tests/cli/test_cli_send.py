"""`thinpool send` and `receive` through real pipes: served and idle, killed on either side, resumed, refused in words."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import WORK, content, discard, new_pool, write
from tests.fakes.warm_thinpool import warm_thinpool
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
THINPOOL = [sys.executable, "-m", "thinpool"]
MIB = 1 << 20


def thinpool(
    *arguments: object, code: int = 0, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    done = warm_thinpool(*map(str, arguments), environment=ENVIRONMENT, stdin=stdin or b"", timeout=120)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def travel(sending: list[object], receiving: list[object]) -> None:
    """send | receive, as a shell would."""
    sender = subprocess.Popen([*THINPOOL, *map(str, sending)], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert sender.stdout is not None
    receiver = subprocess.Popen([*THINPOOL, *map(str, receiving)], env=ENVIRONMENT, stdin=sender.stdout)
    sender.stdout.close()
    assert receiver.wait(120) == 0
    assert sender.wait(120) == 0


def device(pool: Path, name: str) -> dict:
    listed = json.loads(thinpool("list", pool, "--json").stdout)["devices"]
    return next(found for found in listed if found["name"] == name)


def names(pool: Path) -> set[str]:
    return {found["name"] for found in json.loads(thinpool("list", pool, "--json").stdout)["devices"]}


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="thinpool-cli-", dir=WORK))
    yield path
    for pool in (path / "source", path / "target"):
        if (pool / "control").exists():
            subprocess.run([*THINPOOL, "stop", str(pool)], env=ENVIRONMENT, check=False, capture_output=True)
    shutil.rmtree(path)


@pytest.fixture
def source(place: Path) -> Path:
    """`disk` with snapshots `mon` and `tue`; 12 MiB of it do not pack, so that a stream takes a while."""
    noise = random.Random(1)
    with new_pool(place / "source") as pool:
        pool.create_device("disk", 64 * MIB)
        write(pool, "disk", 0, noise.randbytes(12 * MIB))
        pool.create_snapshot("disk", "mon", read_only=True)
        write(pool, "disk", 40 * MIB, noise.randbytes(MIB))
        discard(pool, "disk", MIB, 4 * MIB)
        pool.create_snapshot("disk", "tue", read_only=True)
    return place / "source"


@pytest.fixture
def target(place: Path) -> Path:
    create_pool(place / "target", size_bytes=256 * MIB, metadata_bytes=4 * MIB)
    return place / "target"


def contents(pool: Path, name: str) -> bytes:
    opened = open_pool(PoolLocation.directory(pool), read_only=True)
    try:
        return content(opened, name)
    finally:
        opened.close()


DEEP = pytest.mark.deep


@pytest.mark.parametrize(
    ("source_served", "target_served"),
    [
        (True, False),
        (False, True),
        pytest.param(False, False, marks=DEEP),
        pytest.param(True, True, marks=DEEP),
    ],
)
def test_a_chain_through_pipes(source: Path, target: Path, source_served: bool, target_served: bool):
    wanted = {name: contents(source, name) for name in ("mon", "tue", "disk")}
    for pool, served in ((source, source_served), (target, target_served)):
        if served:
            thinpool("serve", pool, "--detach")
    travel(["send", source, "mon"], ["receive", target, "mon"])
    travel(["send", source, "tue", "-i", "mon", "--compress", "0"], ["receive", target, "tue"])
    travel(["send", source, "disk", "-i", "tue"], ["receive", target, "disk", "--writable"])
    assert names(source) == {"disk", "mon", "tue"}, (
        "the snapshot that was sent instead of the live device is gone"
    )
    for name in ("mon", "tue"):
        assert device(target, name)["content_id"] == device(source, name)["content_id"]
        assert device(target, name)["mapped_bytes"] == device(source, name)["mapped_bytes"]
    assert not device(target, "disk")["read_only"]
    for pool, served in ((source, source_served), (target, target_served)):
        if served:
            thinpool("stop", pool)
            assert b"Traceback" not in (pool / "serve.log").read_bytes()
    assert {name: contents(target, name) for name in wanted} == wanted


def test_a_dry_run_says_how_much(source: Path):
    document = json.loads(thinpool("send", source, "tue", "-i", "mon", "-n", "--json").stdout)
    assert (document["data_bytes"], document["hole_bytes"]) == (MIB, 4 * MIB)
    assert "1 MiB of data" in thinpool("send", source, "tue", "-i", "mon", "-n").stdout.decode()
    thinpool("serve", source, "--detach")
    try:
        assert json.loads(thinpool("send", source, "tue", "-i", "mon", "-n", "--json").stdout) == document
    finally:
        thinpool("stop", source)


def test_the_rate_is_limited(source: Path):
    started = time.monotonic()
    stream = thinpool("send", source, "tue", "-i", "mon", "--rate-limit", "1M").stdout
    assert len(stream) > MIB
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("served", [pytest.param(False, marks=DEEP), True])
def test_refusals_say_why_and_change_nothing(source: Path, target: Path, served: bool):
    full, increment = (
        thinpool("send", source, "mon").stdout,
        thinpool("send", source, "tue", "-i", "mon").stdout,
    )
    if served:
        thinpool("serve", target, "--detach")
    assert b"increment on 'mon'" in thinpool("receive", target, "tue", code=4, stdin=increment).stderr
    assert b"damaged" in thinpool("receive", target, "mon", code=6, stdin=full[: 3 * MIB]).stderr
    assert b"damaged" in thinpool("receive", target, "mon", code=6, stdin=b"no stream at all").stderr
    assert b"empty" in thinpool("receive", target, "mon", code=6, stdin=b"").stderr
    assert names(target) == set()
    thinpool("receive", target, "mon", stdin=full)
    assert b"exists already" in thinpool("receive", target, "mon", code=4, stdin=full).stderr
    assert b"no device" in thinpool("send", source, "none", code=3).stderr
    assert b"no device" in thinpool("send", source, "tue", "-i", "none", code=3).stderr
    assert b"may have changed" in thinpool("send", source, "tue", "-i", "disk", code=4).stderr
    assert b"cannot be resumed" in thinpool("send", source, "--resume", "1-abc", code=2).stderr
    assert b"nothing is partly" in thinpool("receive", target, "x", "--abort", code=3).stderr
    thinpool("send", source, code=2)
    thinpool("send", source, "tue", "--resume", "1-abc", code=2)
    assert names(target) == {"mon"}


def fed_until_killed(target: Path, name: str, stream: bytes, *options: str) -> None:
    """`receive` killed after it took in most of a stream."""
    receiver = subprocess.Popen(
        [*THINPOOL, "receive", str(target), name, *options], env=ENVIRONMENT, stdin=subprocess.PIPE
    )
    assert receiver.stdin is not None
    receiver.stdin.write(stream)
    receiver.stdin.flush()
    time.sleep(0.3)
    receiver.send_signal(signal.SIGKILL)
    receiver.wait()
    receiver.stdin.close()


@pytest.mark.parametrize("served", [False, True])
def test_a_killed_receive_is_resumed(source: Path, target: Path, served: bool):
    stream = thinpool("send", source, "mon").stdout
    if served:
        thinpool("serve", target, "--detach")
    fed_until_killed(target, "mon", stream[: 9 * MIB], "-s")
    deadline = time.monotonic() + 20
    while served and device(target, "mon/receiving")["open_count"] and time.monotonic() < deadline:
        time.sleep(0.05)  # the server finds out that its client is gone, and notes how far it got
    half = device(target, "mon/receiving")
    assert half["receiving"]
    assert "mon" not in names(target)
    refused = thinpool("receive", target, "mon", code=4, stdin=thinpool("send", source, "tue").stdout)
    assert half["resume_token"].encode() in refused.stderr
    thinpool(
        "receive", target, "mon", stdin=thinpool("send", source, "--resume", half["resume_token"]).stdout
    )
    assert names(target) == {"mon"}
    if served:
        thinpool("stop", target)
    assert contents(target, "mon") == contents(source, "mon")


def test_a_killed_receive_without_s_leaves_nothing_in_the_way(source: Path, target: Path):
    stream = thinpool("send", source, "mon").stdout
    fed_until_killed(target, "mon", stream[: 9 * MIB])
    assert names(target) == {"mon/receiving"}
    thinpool("receive", target, "mon", stdin=stream)
    assert names(target) == {"mon"}
    assert contents(target, "mon") == contents(source, "mon")


def test_an_interrupted_receive_prints_its_token(source: Path, target: Path):
    stream = thinpool("send", source, "mon").stdout
    broken = thinpool("receive", target, "mon", "-s", code=6, stdin=stream[: 9 * MIB])
    token = device(target, "mon/receiving")["resume_token"]
    assert f"--resume {token}".encode() in broken.stderr
    rest = thinpool("send", source, "--resume", token).stdout
    assert len(rest) < 6 * MIB
    thinpool("receive", target, "mon", stdin=rest)
    assert contents(target, "mon") == contents(source, "mon")


def test_a_server_that_stops_ends_the_stream_and_it_can_be_resumed(source: Path, target: Path):
    thinpool("serve", source, "--detach")
    sender = subprocess.Popen(
        [*THINPOOL, "send", str(source), "mon", "--rate-limit", "400K"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert sender.stdout is not None
    arrived = sender.stdout.read(MIB + 5000)
    assert b"being sent" in thinpool("delete", source, "mon", code=4).stderr
    begun = time.monotonic()
    thinpool("stop", source)
    assert time.monotonic() - begun < 15, "a stop does not wait for the end of a stream"
    rest, said = sender.communicate(timeout=60)
    assert sender.returncode == 7, said
    thinpool("receive", target, "mon", "-s", code=6, stdin=arrived + rest)
    token = device(target, "mon/receiving")["resume_token"]
    travel(["send", source, "--resume", token], ["receive", target, "mon"])
    assert contents(target, "mon") == contents(source, "mon")


def test_a_server_that_stops_while_it_receives_stops_at_once(source: Path, target: Path):
    thinpool("serve", target, "--detach")
    sender = subprocess.Popen(
        [*THINPOOL, "send", str(source), "mon", "--rate-limit", "400K"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
    )
    receiver = subprocess.Popen(
        [*THINPOOL, "receive", str(target), "mon", "-s"],
        env=ENVIRONMENT,
        stdin=sender.stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sender.stdout is not None
    sender.stdout.close()
    deadline = time.monotonic() + 20
    while "mon/receiving" not in names(target) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    thinpool("stop", target)
    assert time.monotonic() - begun < 15
    _, said = receiver.communicate(timeout=60)
    sender.wait(60)
    assert receiver.returncode == 7, said
    assert "stopping" in said
    token = device(target, "mon/receiving")["resume_token"]
    assert token in said
    travel(["send", source, "--resume", token], ["receive", target, "mon"])
    assert contents(target, "mon") == contents(source, "mon")
