"""Bad input at the command line: one sentence, its exit code, nothing changed on disk, no traceback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.fakes.warm_thinpool import warm_thinpool


def run(*arguments: str | bytes, pool: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment.pop("THINPOOL_POOL", None)
    if pool is not None:
        environment["THINPOOL_POOL"] = str(pool)
    done = warm_thinpool(*arguments, environment=environment)
    said, told = (stream.decode(errors="backslashreplace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, said, told)


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    assert run("init", str(path), "--size", "4M", "--metadata-size", "4M").returncode == 0
    assert run("create", str(path), "disk", "--size", "1M").returncode == 0
    return path


def refused(done: subprocess.CompletedProcess[str], code: int, word: str = "") -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert word in done.stderr
    if code != 2:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


BAD_NAMES = [b"a/b", b"n" * 4096, b"\xff\xfe", b"..", b"tab\there", b"new\nline", b"-dash"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=[repr(name[:12]) for name in BAD_NAMES])
def test_names_that_cannot_be(pool: Path, name: bytes):
    before = contents(pool)
    refused(run(b"create", b"--size", b"1M", b"--", os.fsencode(pool), name), 2)
    refused(run(b"snapshot", b"--", os.fsencode(pool), b"disk", name), 2)
    refused(run(b"rename", b"--", os.fsencode(pool), b"disk", name), 2)
    assert contents(pool) == before


@pytest.mark.parametrize("name", ["50%", "{x}", "%s%n", "a b", "a@b", "ü", "x" * 255, "a-b.c"])
def test_odd_names_work_everywhere(pool: Path, name: str):
    assert run("create", str(pool), name, "--size", "1M").returncode == 0
    refused(run("create", str(pool), name, "--size", "1M"), 4)
    assert run("snapshot", str(pool), name, "s").returncode == 0
    listed = json.loads(run("list", str(pool), "--json").stdout)["devices"]
    assert {name, "s", "disk"} == {device["name"] for device in listed}
    assert run("delete", str(pool), name).returncode == 0
    refused(run("delete", str(pool), name), 3)


@pytest.mark.parametrize("size", ["0", "-1", "12X", "", "1.0001K", "1e9", "G"])
def test_sizes_that_are_none(pool: Path, size: str):
    before = contents(pool)
    for command in (["create", str(pool), "new"], ["resize", str(pool), "disk"], ["grow", str(pool)]):
        refused(run(*command, f"--size={size}"), 2)
    assert contents(pool) == before


@pytest.mark.parametrize("block", ["4K", "63K", "96K", "2G", "0"])
def test_block_sizes_that_dm_thin_has_not(tmp_path: Path, block: str):
    refused(run("init", str(tmp_path / "p"), "--size", "1G", "--block-size", block), 2)
    assert not list(tmp_path.iterdir())


def test_unknown_and_duplicate_names(pool: Path):
    before = contents(pool)
    refused(run("delete", str(pool), "none"), 3, "none")
    refused(run("snapshot", str(pool), "none", "s"), 3)
    refused(run("rollback", str(pool), "disk", "none"), 3)
    refused(run("create", str(pool), "disk", "--size", "1M"), 4)
    refused(run("snapshot", str(pool), "disk", "disk"), 4)
    refused(run("rename", str(pool), "disk", "disk"), 4)
    refused(run("resize", str(pool), "disk", "--size", "512K"), 2)
    assert contents(pool) == before


def test_no_pool_there(tmp_path: Path):
    refused(run("status", str(tmp_path / "none")), 3)
    (tmp_path / "empty").mkdir()
    refused(run("status", str(tmp_path / "empty")), 6)
    (tmp_path / "file").write_bytes(b"x" * 100)
    refused(run("status", str(tmp_path / "file")), 6)
    refused(run("init", str(tmp_path / "file"), "--size", "1G"), 4)


def spoil_magic(raw: bytearray) -> None:
    raw[32:40] = b"\0" * 8


def spoil_checksum(raw: bytearray) -> None:
    raw[100] ^= 1


def foreign(raw: bytearray) -> None:
    raw[:] = os.urandom(4096) * (len(raw) // 4096)


def zeroed(raw: bytearray) -> None:
    raw[:] = bytes(len(raw))


def truncated(raw: bytearray) -> None:
    del raw[8192:]


def cut_inside_the_superblock(raw: bytearray) -> None:
    del raw[100:]


def emptied(raw: bytearray) -> None:
    raw.clear()


SPOILERS = [spoil_magic, spoil_checksum, foreign, zeroed, truncated, cut_inside_the_superblock, emptied]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_metadata_that_is_none_or_damaged(pool: Path, spoil):
    raw = bytearray((pool / "metadata").read_bytes())
    spoil(raw)
    (pool / "metadata").write_bytes(raw)
    before = contents(pool)
    for command in (["status", str(pool)], ["create", str(pool), "x", "--size", "1M"], ["serve", str(pool)]):
        refused(run(*command), 6)
    assert contents(pool) == before


def test_data_file_missing_or_short(pool: Path):
    os.truncate(pool / "data", 100)
    before = contents(pool)
    refused(run("status", str(pool)), 6)
    refused(run("create", str(pool), "x", "--size", "1M"), 6)
    assert contents(pool) == before
    (pool / "data").unlink()
    refused(run("status", str(pool)), 6)
    assert not (pool / "data").exists()


def test_a_catalogue_that_is_none(pool: Path):
    (pool / "catalog").write_bytes(b"not a database" * 100)
    before = contents(pool)
    refused(run("list", str(pool)), 6)
    assert contents(pool) == before


def test_a_second_opener_is_told_who_has_it(pool: Path):
    from thinpool.pool_location import PoolLocation
    from thinpool.pool_lock import PoolLock

    lock = PoolLock.acquire(PoolLocation.directory(pool))
    try:
        refused(run("create", str(pool), "x", "--size", "1M"), 4, str(os.getpid()))
        bare = ["--metadata", str(pool / "metadata"), "--data", str(pool / "data")]
        refused(run("create", *bare, "x", "--size", "1M"), 4)
    finally:
        lock.close()


def test_attach_wants_a_server(pool: Path):
    refused(run("attach", str(pool), "disk"), 7)
    refused(run("detach", str(pool), "disk"), 3)
    refused(run("stop", str(pool)), 7)


@pytest.mark.parametrize(
    "command", ["init", "status", "create", "list", "snapshot", "delete", "rename", "resize"]
)
def test_every_command_has_help_with_examples_and_refuses_unknown_options(command: str):
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
    refused(run(command, "--no-such-option"), 2)


def test_pool_from_the_environment(pool: Path):
    assert "disk" in run("list", pool=pool).stdout
    assert run("create", "other", "--size", "1M", pool=pool).returncode == 0
