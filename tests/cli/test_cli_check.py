"""check, dump and restore as users type them: on files, on idle and served pools, on damage; nothing written unasked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from metadata import FileStore, MemoryStore, PoolMetadata, recount
from tests.fakes.dump_texts import IMAGES, our_dump
from tests.fakes.metadata_edits import Image
from tests.fakes.thin_tools import run_tool, thin_restore
from thinpool.cli import cli
from thinpool.cli.report import run_reporting
from thinpool.control_client import ControlClient
from tools.disk_client import DiskClient

CHECKOUT = Path(__file__).resolve().parents[2]
BLOCK = 64 << 10


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    stdout: str
    stderr: str


def thinpool(*arguments: object, code: int = 0, stdin: bytes = b"") -> Done:
    """Run a command in this process, as `main` would; a server is started as its own process."""
    words = [str(argument) for argument in arguments]
    if words[0] == "serve":
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        subprocess.run([sys.executable, "-m", "thinpool", *words], env=environment, check=True, timeout=200)
        return Done("", "")
    streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
    given = io.TextIOWrapper(io.BytesIO(stdin))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("THINPOOL_POOL", raising=False)
        patch.setattr(sys, "stdin", given)
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            ended = run_reporting(cli, words)
    said = [stream.buffer.getvalue().decode() for stream in streams]  # type: ignore[attr-defined]
    assert ended == code, said
    assert "internal error" not in said[1]
    return Done(*said)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_mappings(pool: Path) -> None:
    """Give an idle pool a device of three leaves and a snapshot that changed in the first of them."""
    thinpool("create", pool, "disk", "--size", "1G")
    thinpool("snapshot", pool, "disk", "early")
    metadata = PoolMetadata.open(FileStore(pool / "metadata", writable=True))
    from tests.unit.test_metadata_recount import mappings

    metadata.insert(1, *mappings(0, 600, 0, 1))
    metadata.commit()
    metadata.create_snapshot(7, 1)
    metadata.insert(7, *mappings(3, 2, 1000, 2))
    metadata.commit()
    metadata.close()


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    thinpool("init", path, "--size", "256M", "--metadata-size", "4M")
    add_mappings(path)
    return path


@pytest.fixture
def served(pool: Path):
    thinpool("serve", pool, "--detach")
    pid = json.loads(thinpool("status", pool, "--json").stdout)["server"]["pid"]
    yield pool
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)


def spoil(path: Path, change) -> Image:
    image = Image(path.read_bytes())
    change(image)
    path.write_bytes(image.image)
    return image


def break_leaf(image: Image) -> int:
    leaf = image.leaves(image.root_of(1))[1]
    image.image[leaf * 4096 + 100] ^= 4
    return leaf


def leak(image: Image) -> None:
    block = image.free_block("data_space")
    image.set_count("data_space", block, 1)


# check


def test_sound_pools_and_files(pool: Path):
    for arguments in ([pool], [pool / "metadata"], ["--metadata", pool / "metadata"]):
        assert thinpool("check", *arguments).stdout.endswith(": nothing is wrong\n")
    assert thinpool("check", "-q", pool).stdout == ""
    report = json.loads(thinpool("check", pool, "--json").stdout)
    assert (report["errors"], report["leaks"], report["hints"], report["problems"]) == (0, 0, 0, [])
    assert report["checked"] == "everything"


def test_damage_is_said_with_names_ranges_and_advice(pool: Path):
    image = Image((pool / "metadata").read_bytes())
    leaf = break_leaf(image)
    (pool / "metadata").write_bytes(image.image)
    before = digest(pool / "metadata")
    said = thinpool("check", pool, code=6).stdout
    error, affects, advice = said.splitlines()[:3]
    assert error.startswith("error: mappings of device 1, keys ")
    assert f"block {leaf}: its checksum does not match" in error
    assert "'disk' (device 1), blocks " in affects
    assert "device 7, blocks " in affects
    assert "MiB" in affects
    assert "thinpool repair" in advice
    problem = json.loads(thinpool("check", pool, "--json", code=6).stdout)["problems"][0]
    assert problem["fault"] == "unreadable"
    assert problem["path"][-1] == problem["block"] == leaf
    assert {each["device_id"]: each["name"] for each in problem["affects"]} == {1: "disk", 7: None}
    assert thinpool("check", pool, "-q", code=6).stdout == ""
    # Nothing that needs the damaged block: nothing to complain of.
    thinpool("check", pool, "--skip-mappings")
    thinpool("check", pool, "--super-block-only")
    thinpool("check", pool, "--auto-repair", "--clear-needs-check", code=6)
    assert digest(pool / "metadata") == before


def test_leaks_and_figures_are_repaired_when_asked(pool: Path):
    metadata = pool / "metadata"
    spoil(metadata, leak)
    spoil(metadata, lambda image: image.set_superblock(flags=1))
    details = Image(metadata.read_bytes()).superblock.details_root
    spoil(metadata, lambda image: image.edit_values(details, lambda v: v["mapped_blocks"].__setitem__(0, 17)))
    before = our_dump(MemoryStore(metadata.read_bytes())).replace(
        'mapped_blocks="17"', 'mapped_blocks="600"', 1
    )
    spoiled = digest(metadata)
    said = thinpool("check", pool, code=6).stdout
    assert "1 leak" in said
    assert "marked as needing a check" in said
    thinpool("check", pool, "--ignore-non-fatal-errors")
    assert (
        "the mark that the pool needs a check stays"
        in thinpool("check", pool, "--clear-needs-check", code=6).stdout
    )
    assert digest(metadata) == spoiled
    said = thinpool("check", pool, "--auto-repair", "--clear-needs-check").stdout
    assert "repaired: 1 leak" in said
    assert "taken off" in said
    assert recount(MemoryStore(metadata.read_bytes())) == []
    assert our_dump(MemoryStore(metadata.read_bytes())) == before.replace('flags="1"', 'flags="0"')
    thinpool("create", pool, "usable", "--size", "1M")
    thinpool("check", pool)


def test_a_damaged_space_map_is_counted_anew(pool: Path):
    metadata = pool / "metadata"
    location, _ = Image(metadata.read_bytes()).bitmap_of("data_space", 0)
    before = our_dump(MemoryStore(metadata.read_bytes()))
    spoil(metadata, lambda image: image.put(location, bytes(4096)))
    thinpool("check", pool, code=6)
    thinpool("check", pool, "--auto-repair")
    assert recount(MemoryStore(metadata.read_bytes())) == []
    assert our_dump(MemoryStore(metadata.read_bytes())) == before


@pytest.mark.peer
def test_debian_accepts_what_was_repaired(require_tool, pool: Path):
    require_tool("thin_check")
    spoil(pool / "metadata", leak)
    thinpool("check", pool, "--auto-repair")
    assert run_tool("thin_check", pool / "metadata") == (0, run_tool("thin_check", pool / "metadata")[1])


def test_served_pool_is_checked_and_dumped_while_clients_write(served: Path):
    stop = threading.Event()

    def write() -> None:
        with DiskClient(served / "nbd.sock", "disk") as disk:
            number = 0
            while not stop.is_set():
                disk.write(number % 3000 * BLOCK, bytes([number % 255 + 1]) * 4096)
                if number % 50 == 0:
                    disk.flush()
                number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            report = json.loads(thinpool("check", served, "--json").stdout)
            assert report["problems"] == []
            dumped = thinpool("dump", served).stdout
            assert dumped.endswith("</superblock>\n")
            assert 'nr_data_blocks="4096"' in dumped
    finally:
        stop.set()
        writer.join()
    # The snapshot of the metadata goes as soon as the server sees that the reader has gone.
    for _ in range(100):
        if json.loads(thinpool("status", served, "--json").stdout)["held_root"] == 0:
            break
    assert json.loads(thinpool("status", served, "--json").stdout)["held_root"] == 0
    refused = thinpool("check", served, "--auto-repair", code=4)
    assert "busy" in refused.stderr
    assert thinpool("check", served / "metadata", code=4).stdout == ""
    thinpool("stop", served)
    thinpool("check", served)


def test_a_metadata_snapshot_that_is_there_is_respected(pool: Path):
    metadata = PoolMetadata.open(FileStore(pool / "metadata", writable=True))
    metadata.reserve_metadata_snapshot()
    metadata.commit()
    metadata.create_device(99)
    metadata.commit()
    metadata.close()
    thinpool("serve", pool, "--detach")
    try:
        report = json.loads(thinpool("check", pool, "--json").stdout)
        assert report["checked"] == "the metadata snapshot"
        assert "was there before" in report["remark"]
        assert 'dev_id="99"' not in thinpool("dump", pool).stdout
        assert json.loads(thinpool("status", pool, "--json").stdout)["held_root"] != 0
    finally:
        thinpool("stop", pool)
    assert 'dev_id="99"' in thinpool("dump", pool).stdout
    assert 'dev_id="99"' not in thinpool("dump", "-m", pool).stdout
    thinpool("check", "-m", pool)


def held_root(pool: Path) -> int:
    return int(json.loads(thinpool("status", pool, "--json").stdout)["held_root"])


def test_a_reader_that_dies_and_a_server_that_dies(served: Path):
    first, second = (ControlClient(served / "control").hold_metadata() for _ in range(2))
    assert (first.fresh, second.fresh) == (True, False)
    assert first.held_root == second.held_root == held_root(served) != 0
    first.close()
    assert second.lasts
    assert held_root(served) != 0
    pid = json.loads(thinpool("status", served, "--json").stdout)["server"]["pid"]
    os.kill(pid, signal.SIGKILL)
    select.select([second._connection.sock], [], [], 10)
    assert not second.lasts
    second.close()
    assert held_root(served) != 0  # looking changes nothing
    thinpool("create", served, "new", "--size", "1M")
    assert held_root(served) == 0
    thinpool("check", served)


def test_stopping_releases_what_readers_hold(served: Path):
    hold = ControlClient(served / "control").hold_metadata()
    thinpool("stop", served)
    assert not hold.lasts
    hold.close()
    assert held_root(served) == 0


# dump and restore


@pytest.mark.peer
def test_dump_is_that_of_thin_dump(require_tool, pool: Path, tmp_path: Path):
    require_tool("thin_dump")
    _, expected = run_tool("thin_dump", pool / "metadata")
    assert thinpool("dump", pool).stdout == expected
    thinpool("dump", pool, "-o", tmp_path / "x.xml")
    assert (tmp_path / "x.xml").read_text() == expected
    _, one = run_tool("thin_dump", "--dev-id", "7", "--skip-mappings", pool / "metadata")
    assert thinpool("dump", pool, "--dev-id", 7, "--skip-mappings").stdout == one


def test_dump_of_damage_leaves_no_file(pool: Path, tmp_path: Path):
    spoil(pool / "metadata", break_leaf)
    done = thinpool("dump", pool, "-o", tmp_path / "x.xml", code=6)
    assert "damaged" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    assert "no metadata snapshot" in thinpool("dump", "-m", pool, code=3).stderr


def test_dump_for_people_and_of_what_can_be_read(pool: Path, tmp_path: Path):
    assert thinpool("dump", pool, "-f", "human_readable").stdout.startswith("begin superblock: ")
    whole = thinpool("dump", pool).stdout
    assert thinpool("dump", pool, "--repair").stdout == whole
    spoil(pool / "metadata", break_leaf)
    before = digest(pool / "metadata")
    done = thinpool("dump", pool, "-r", "-o", tmp_path / "x.xml", code=6)
    assert "lost, if it was written" in done.stderr
    assert digest(pool / "metadata") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool", "x.xml"]
    repaired = tmp_path / "repaired"
    thinpool("repair", pool, repaired, code=6)
    assert (tmp_path / "x.xml").read_text() == thinpool("dump", repaired).stdout != whole
    assert "metadata snapshot" in thinpool("dump", "-r", "-m", pool, code=2).stderr


def test_restore_takes_figures_for_metadata_by_itself_only(pool: Path, tmp_path: Path):
    text = thinpool("dump", pool).stdout.encode()
    image = tmp_path / "new"
    given = ("--transaction-id", 77, "--data-block-size", "128K", "--nr-data-blocks", 99_999)
    thinpool("restore", "-i", "-", "-o", image, *given, stdin=text)
    head = thinpool("dump", image).stdout.splitlines()[0]
    assert 'transaction="77"' in head
    assert 'data_block_size="256" nr_data_blocks="99999"' in head
    before = digest(pool / "metadata")
    thinpool("restore", "-i", "-", "-o", pool, "--transaction-id", 77, stdin=text, code=2)
    thinpool("restore", "-i", "-", "-o", image, "--force", "--data-block-size", "1000", stdin=text, code=2)
    assert digest(pool / "metadata") == before


def test_restore_into_files_and_pools(pool: Path, tmp_path: Path):
    text = thinpool("dump", pool).stdout
    image = tmp_path / "new"
    thinpool("restore", "-i", "-", "-o", image, stdin=text.encode())
    assert our_dump(FileStore(image, writable=False)) == text
    assert recount(FileStore(image, writable=False)) == []
    before = digest(image)
    assert "--force" in thinpool("restore", "-i", "-", "-o", image, stdin=text.encode(), code=4).stderr
    assert digest(image) == before
    thinpool("restore", "-i", "-", "-o", image, "--force", "--metadata-size", "3M", stdin=text.encode())
    assert image.stat().st_size == 3 << 20
    old = digest(pool / "metadata")
    said = json.loads(thinpool("restore", "-i", "-", "-o", pool, "--json", stdin=text.encode()).stdout)
    assert digest(Path(said["kept"])) == old
    assert thinpool("dump", pool).stdout == text
    thinpool("check", pool)
    names = {device["name"] for device in json.loads(thinpool("list", pool, "--json").stdout)["devices"]}
    assert names == {"disk", "early", "thin-7"}


BAD_XML = [
    b"",
    b"<superblock",
    b"not xml at all",
    IMAGES["small with holes"].replace('data_begin="0"', 'data_begin="199999"').encode(),
    IMAGES["small with holes"].replace('data_block_size="128"', 'data_block_size="100"').encode(),
    IMAGES["small with holes"].replace('length="10"', 'length="ten"').encode(),
    IMAGES["small with holes"].replace("</superblock>", "").encode(),
]


@pytest.mark.parametrize("text", BAD_XML, ids=range(len(BAD_XML)))
def test_bad_xml_is_one_sentence_and_leaves_nothing(pool: Path, tmp_path: Path, text: bytes):
    before = digest(pool / "metadata")
    done = thinpool("restore", "-i", "-", "-o", tmp_path / "new", stdin=text, code=2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    thinpool("restore", "-i", "-", "-o", pool, stdin=text, code=2)
    assert digest(pool / "metadata") == before
    assert {path.name for path in tmp_path.iterdir()} == {"pool"}
    assert not list(pool.glob("metadata.before*"))


def test_refusals(pool: Path, served: Path, tmp_path: Path):
    text = IMAGES["empty"].encode()
    assert "in use" in thinpool("restore", "-i", "-", "-o", served, stdin=text, code=4).stderr
    thinpool("restore", "-i", tmp_path / "none.xml", "-o", tmp_path / "new", code=3)
    thinpool("restore", "-i", "-", "-o", tmp_path / "none" / "new", stdin=text, code=3)
    thinpool("restore", "-i", "-", "-o", tmp_path / "new", "--metadata-size", "4K", stdin=text, code=2)
    thinpool("check", tmp_path / "none", code=3)
    thinpool("check", code=2)
    thinpool("check", served, "--metadata", "x", code=2)
    thinpool("check", served, "--auto-repair", "--skip-mappings", code=2)
    (tmp_path / "foreign").write_bytes(b"x" * 8192)
    (tmp_path / "short").write_bytes(b"x")
    for name in ("foreign", "short"):
        for command in ("check", "dump"):
            thinpool(command, tmp_path / name, code=6)


@pytest.mark.peer
def test_restore_reads_what_debian_writes(require_tool, tmp_path: Path):
    require_tool("thin_restore")
    made = tmp_path / "debian"
    thin_restore(IMAGES["six devices naming the same blocks"], made, blocks=3000)
    _, text = run_tool("thin_dump", made)
    thinpool("restore", "-i", "-", "-o", tmp_path / "ours", stdin=text.encode())
    code, again = run_tool("thin_dump", tmp_path / "ours")
    assert (code, again) == (0, text)


# repair


def test_repair_of_a_sound_pool_is_a_copy(pool: Path, tmp_path: Path):
    before = digest(pool / "metadata")
    said = thinpool("repair", pool, tmp_path / "new").stdout
    assert "3 of 3 devices complete" in said
    assert digest(pool / "metadata") == before
    assert our_dump(FileStore(tmp_path / "new", writable=False)) == thinpool("dump", pool).stdout


def test_repair_says_what_each_device_lost(pool: Path, tmp_path: Path):
    image = Image((pool / "metadata").read_bytes())
    break_leaf(image)
    (pool / "metadata").write_bytes(image.image)
    before = digest(pool / "metadata")
    new = tmp_path / "new"
    said = thinpool("repair", pool, new, code=6).stdout
    assert "'disk' (device 1) has lost blocks" in said
    assert "lost, if it was written: blocks " in said
    assert "'early' (device 2) is complete" in said
    assert digest(pool / "metadata") == before
    assert recount(FileStore(new, writable=False)) == []
    thinpool("check", new)
    new.unlink()
    report = json.loads(thinpool("repair", pool, new, "--json", code=6).stdout)
    lost = {each["device_id"]: each["lost"] for each in report["devices"]}
    assert lost[2] == []
    assert lost[1] == lost[7] != []
    assert not report["lossless"]


def test_a_plan_says_what_the_repair_will_do_and_writes_nothing(pool: Path, tmp_path: Path):
    """Field case B133: faults and remedy by structure, the losses by device, then the same from the repair."""

    def damage(image: Image) -> None:
        break_leaf(image)
        image.put(image.superblock.data_space.bitmap_root, bytes(4096))

    spoil(pool / "metadata", damage)
    before = {path.name: path.read_bytes() for path in pool.iterdir() if path.name != "data"}
    plan = json.loads(thinpool("repair", "--plan", pool, "--json", code=6).stdout)
    said = thinpool("repair", "--plan", pool, code=6).stdout
    assert {path.name: path.read_bytes() for path in pool.iterdir() if path.name != "data"} == before
    assert list(tmp_path.iterdir()) == [pool]
    changes = {change["structure"]: change for change in plan["changes"]}
    assert changes["mappings"]["errors"] >= 1
    assert changes["data space map index"]["remedy"] == "counted anew"
    assert "mappings: 1 error; copied where they can be read" in said
    assert "'disk' (device 1) has lost blocks" in said
    assert "nothing was written; 1 of 3 devices complete" in said
    done = json.loads(thinpool("repair", pool, tmp_path / "new", "--json", code=6).stdout)
    assert {key: plan[key] for key in done} == done, "the repair did what the plan said"


def test_a_plan_for_a_sound_pool_changes_nothing(pool: Path, tmp_path: Path):
    said = thinpool("repair", "--plan", pool).stdout
    assert "error" not in said
    assert "3 of 3 devices complete" in said
    thinpool("repair", "--plan", pool, tmp_path / "new", code=2)
    thinpool("repair", pool, code=2)
    assert "20 KiB needed" in thinpool("repair", "--plan", pool, "--metadata-size", "16K", code=5).stderr


def test_repair_without_a_superblock(pool: Path, tmp_path: Path):
    text = thinpool("dump", pool).stdout
    spoil(pool / "metadata", lambda image: image.put(0, bytes(4096)))
    refused = thinpool("repair", pool, tmp_path / "new", code=6)
    assert "--data-block-size" in refused.stderr
    assert not (tmp_path / "new").exists()
    transaction = text.split('transaction="')[1].split('"')[0]
    options = ["--data-block-size", "64K", "--transaction-id", transaction]
    assert "superblock is lost" in thinpool("repair", pool, tmp_path / "new", *options, code=6).stdout
    assert our_dump(FileStore(tmp_path / "new", writable=False)) == text


def test_repair_refuses_to_write_to_its_source(pool: Path, tmp_path: Path):
    before = digest(pool / "metadata")
    for target in (pool, pool / "metadata"):
        assert "another file" in thinpool("repair", pool, target, "--force", code=4).stderr
    (tmp_path / "link").symlink_to(pool / "metadata")
    thinpool("repair", pool, tmp_path / "link", "--force", code=4)
    thinpool("repair", tmp_path / "none", tmp_path / "new", code=3)
    thinpool("repair", pool, tmp_path / "none" / "new", code=3)
    thinpool("repair", pool, tmp_path / "new", "--data-block-size", "1000", code=2)
    assert digest(pool / "metadata") == before
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "link"}
