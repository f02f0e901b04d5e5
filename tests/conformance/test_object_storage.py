"""Snapshots through a real S3 server: pushed and pulled by the command, lazily with the server gone half-way.

The deep mode makes the whole trip: a file system with a source tree, ten days of changes, ten increments, day seven
restored into a fresh pool. What it prints is quoted in docs/scale.md.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd import RemoteError
from nbd.client import Client
from tests.conformance.running_pool import (
    ENVIRONMENT,
    RunningPool,
    require,
    require_loop_mounts,
    run,
    running_pool,
)
from tests.conformance.test_filesystems import assert_same_trees, attach, copy_sources
from tests.fakes.s3_server import S3Server
from tests.fakes.tcp_relay import TcpRelay

pytestmark = [pytest.mark.peer, pytest.mark.timeout(280)]
pytest.importorskip("obstore", reason="needs the package obstore")

MIB = 1 << 20
URL = "s3://bucket/fleet"


@pytest.fixture
def relay(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TcpRelay]:
    """The way to the server, for tests that cut it."""
    made = TcpRelay(server.port)
    monkeypatch.setitem(ENVIRONMENT, "AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
    yield made
    made.go_away()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    made = S3Server(tmp_path / "s3")
    for key, value in {**made.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(key, value)
        monkeypatch.setitem(ENVIRONMENT, key, value)
    made.start()
    yield made
    made.stop()


def push(pool: RunningPool, name: str, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pool.command("push", name, URL, "--json", *options).stdout)
    return found


@pytest.mark.parametrize("kills", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_through_s3_and_lazily_back_with_the_store_gone_half_way(
    server: S3Server, relay: TcpRelay, tmp_path: Path, kills: bool
) -> None:
    """The server is killed and started anew in the deep mode; otherwise the way to it is cut, which is the same to us."""
    go_away, come_back = (server.stop, server.start) if kills else (relay.go_away, relay.come_back)
    key = tmp_path / "key"
    key.write_text("a passphrase\n")
    options = ("--key-file", str(key))
    contents = [random.Random(number).randbytes(MIB) for number in range(24)]
    with running_pool("1G") as pool, running_pool("1G", options=("--block-size", "128K")) as other:
        pool.operate("create", name="disk", size_bytes=200 * MIB)
        with Client.connect(pool.uri("disk")) as client:
            for number, content in enumerate(contents):
                client.write(number * 8 * MIB, content)
        pool.operate("snapshot", origin="disk", name="monday", read_only=True)
        assert push(pool, "monday", *options)["push"]["new_chunks"] == 24 * 16
        with Client.connect(pool.uri("disk")) as client:
            client.write(8 * MIB, b"tuesday!")
            client.trim(16 * MIB, MIB)
        pool.operate("snapshot", origin="disk", name="tuesday", read_only=True)
        report = push(pool, "tuesday", *options)
        assert (report["push"]["base"], report["push"]["new_chunks"]) == ("monday", 1)
        wrong = pool.thinpool("ls", URL, check=False)
        assert (wrong.returncode, "--key-file" in wrong.stderr) == (2, True)
        listed = json.loads(pool.thinpool("ls", URL, "--json", *options).stdout)["snapshots"]
        assert [about["name"] for about in listed] == ["monday", "tuesday"]

        contents[1] = b"tuesday!" + contents[1][8:]
        contents[2] = bytes(MIB)
        other.thinpool("pull", URL, str(other.path), "tuesday", "--lazy", *options)
        _read_with_the_store_gone(other, contents, go_away, come_back)
        other.thinpool("pull", URL, str(other.path), "tuesday", *options)
        with Client.connect(other.uri("tuesday")) as client:
            assert [client.read(number * 8 * MIB, MIB) for number in range(24)] == contents
        assert other.list()["tuesday"]["mapped_bytes"] == 23 * MIB
        other.stop()
        other.check_metadata()
        assert run_verify(other, *options) == 0


def _read_with_the_store_gone(
    pool: RunningPool,
    contents: list[bytes],
    go_away: Callable[[], None],
    come_back: Callable[[], None],
) -> None:
    """What was read before stays, what was not is an I/O error, also after a restart of the server of the pool."""
    with Client.connect(pool.uri("tuesday")) as client:
        assert client.read(8 * MIB, 1000) == contents[1][:1000]
        go_away()
        assert client.read(8 * MIB, 1000) == contents[1][:1000]
    pool.stop()
    pool.start()
    local, missing = 0, 0
    with Client.connect(pool.uri("tuesday"), timeout_seconds=200) as client:
        assert client.read(8 * MIB, 1000) == contents[1][:1000]
        for number in (0, 23):
            try:
                local += client.read(number * 8 * MIB, MIB) == contents[number]
            except RemoteError as error:
                assert error.error == errno.EIO
                missing += 1
        assert local + missing == 2
        assert missing
    come_back()


def run_verify(pool: RunningPool, *options: str) -> int:
    return pool.thinpool("verify", URL, "--read-data", *options).returncode


def _change_a_day(root: Path, day: int) -> int:
    """What a day does to a source tree: some files change, some go, some come. Returns the bytes written."""
    chance = random.Random(day)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    written = 0
    for path in chance.sample(files, len(files) // 50):
        text = path.read_bytes()
        path.write_bytes(text[: len(text) // 2] + b"# day %d\n" % day + text[len(text) // 2 :])
        written += len(text)
    for path in chance.sample(files, len(files) // 200):
        path.unlink()
    (root / f"day{day}").mkdir()
    for number in range(20):
        (root / f"day{day}" / str(number)).write_bytes(chance.randbytes(30_000))
        written += 30_000
    return written


@pytest.mark.deep
@pytest.mark.root
@pytest.mark.timeout(900)
def test_ten_days_into_s3_and_day_seven_back(server: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    require_loop_mounts()
    require("mkfs.ext4", "e2fsck", "nbdfuse", "losetup", "fusermount3")
    lines = []
    with running_pool("4G") as pool, running_pool("4G") as fresh:
        pool.command("create", "disk", "--size", "2G")
        run("mkfs.ext4", "-q", "-F", attach(pool, "disk"))
        pool.command("detach", "disk")
        live, copy, back = pool.work / "live", pool.work / "copy", fresh.work / "back"
        live.mkdir()
        back.mkdir()
        attach(pool, "disk", "--mount", str(live))
        copy_sources(live, 150_000_000)
        for day in range(11):
            written = _change_a_day(live, day) if day else 0
            run("sync", "-f", live)
            if day == 7:
                shutil.copytree(live, copy, symlinks=True)
            run("fsfreeze", "-f", live)
            pool.command("snapshot", "disk", f"day{day}", "--read-only")
            run("fsfreeze", "-u", live)
            changed = 0
            if day:
                diff = json.loads(pool.command("diff", f"day{day - 1}", f"day{day}", "--json").stdout)
                changed = diff["data_bytes"]
            begun = time.monotonic()
            report = push(pool, f"day{day}")
            seconds = time.monotonic() - begun
            pushed, requests = report["push"], report["requests"]
            assert pushed["read_bytes"] == changed or day == 0
            lines.append(
                f"day {day}: {written} written to files, {changed} in changed blocks, {pushed['read_bytes']} read, "
                f"{pushed['sent_bytes']} sent, {requests['puts']} puts, {requests['gets']} gets, "
                f"{requests['lists']} lists, {seconds:.2f} s"
            )
        pool.command("detach", "disk")
        begun = time.monotonic()
        fresh.thinpool("pull", URL, str(fresh.path), "restored", "--snapshot", "day7")
        lines.append(f"day 7 restored in {time.monotonic() - begun:.2f} s")
        run("e2fsck", "-fn", attach(fresh, "restored"))
        fresh.command("detach", "restored")
        attach(fresh, "restored", "--mount", str(back))
        assert_same_trees(copy, back)
        fresh.command("detach", "restored")
        assert run_verify(pool) == 0
    with capsys.disabled():
        print("\n" + "\n".join(lines))
