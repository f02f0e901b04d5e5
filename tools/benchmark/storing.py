"""What it costs to push into an object store and to pull from one, beside copying and compressing alone.

In: one data set (a file system with this machine's files), a store in a directory, the commands as a user types them.
Out: S3 and its latencies: `tests/conformance/test_object_storage.py` makes the trip through a real server.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation
from thinpool.store.blobs import compressed
from thinpool.store.manifests import Description, Manifest
from thinpool.store.packs import PACK_BYTES, PACK_HEAD
from thinpool.store.segments import Place, Segment

from .filling import write

MIB = 1 << 20
IMAGE_BYTES = 10 << 30
CHANGED_PARTS = 100


class Bench:
    """The files of one run."""

    def __init__(self, work: Path, data_bytes: int) -> None:
        self.work = work
        self.image = work / "image"
        self.url = (work / "store").as_uri()
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
        self.data_bytes = data_bytes
        self.lines: list[str] = []

    def timed(self, *command: str | Path) -> tuple[float, str]:
        """Run a command; its seconds and its output."""
        begun = time.monotonic()
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
            env=self.environment,
        )
        return time.monotonic() - begun, done.stdout

    def thinpool(self, *words: str | Path) -> tuple[float, str]:
        return self.timed(sys.executable, "-m", "thinpool", *words)

    def row(self, what: str, seconds: float, data_bytes: int, remark: str = "") -> None:
        self.lines.append(f"| {what} | {seconds:.2f} | {data_bytes / MIB / seconds:.0f} | {remark} |")

    # --- what is measured ---

    def make_image(self) -> None:
        """A file system of 10 GiB with files of this machine, and the same in a pool."""
        tree = self.work / "tree"
        tree.mkdir()
        copied = 0
        for folder, _, names in os.walk("/usr/lib"):
            for name in names:
                source = Path(folder, name)
                if copied >= self.data_bytes or source.is_symlink() or not source.is_file():
                    continue
                place = tree / source.relative_to("/usr/lib")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)
                copied += source.stat().st_size
        (tree / "first-file").write_text("here\n")
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        self.timed("mkfs.ext4", "-q", "-F", "-d", tree, self.image)
        shutil.rmtree(tree)
        create_pool(self.work / "pool", size_bytes=4 << 30)
        pool = open_pool(PoolLocation.directory(self.work / "pool"))
        pool.create_device("disk", IMAGE_BYTES)
        entry = pool.catalog.by_name("disk")
        assert entry is not None
        session = pool.open_session(entry)
        with self.image.open("rb") as file, (self.work / "data").open("wb") as data:
            offset = 0
            while True:
                try:
                    offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
                while offset < end:
                    piece = os.pread(file.fileno(), min(MIB, end - offset), offset)
                    write(session, offset, piece)
                    data.write(piece)
                    offset += len(piece)
        session.close()
        pool.create_snapshot("disk", "first", read_only=True)
        self.mapped_bytes = pool.info("first").mapped_bytes or 0
        pool.close()

    def change(self, name: str) -> int:
        """Change every hundredth mapped block at random places; returns the bytes that changed."""
        chance = random.Random(1)
        pool = open_pool(PoolLocation.directory(self.work / "pool"))
        entry = pool.catalog.by_name("disk")
        assert entry is not None
        device_id = entry.device_id
        blocks = [
            int(key) for keys, _ in pool.engine.metadata.mappings(device_id, 0, 1 << 40) for key in keys
        ]
        session = pool.open_session(entry)
        chosen = chance.sample(blocks, len(blocks) // CHANGED_PARTS)
        for block in chosen:
            write(session, block * pool.block_bytes + 4096, chance.randbytes(4096))
        session.close()
        pool.create_snapshot("disk", name, read_only=True)
        pool.close()
        return len(chosen) * 65536

    def alone(self) -> None:
        """Copying and compressing alone, of the same data."""
        mapped = self.mapped_bytes
        seconds, _ = self.timed(
            "zstd", "-3", "-T2", "-q", "-f", self.work / "data", "-o", self.work / "image.zst"
        )
        size = (self.work / "image.zst").stat().st_size
        self.row("zstd -3 -T2 of the image without its holes", seconds, mapped, f"{size / MIB:.0f} MiB")
        (self.work / "image.zst").unlink()
        self.thinpool("serve", self.work / "pool", "--detach")
        uri = f"nbd+unix:///first?socket={self.work}/pool/nbd.sock"
        seconds, _ = self.timed("nbdcopy", "--flush", uri, self.work / "copy")
        self.row("nbdcopy from the served pool to a file", seconds, mapped)
        (self.work / "copy").unlink()
        self.thinpool("stop", self.work / "pool")

    def push(self, name: str, data_bytes: int, what: str) -> None:
        seconds, output = self.thinpool("push", self.work / "pool", name, self.url, "--json")
        found = json.loads(output)
        pushed, requests = found["push"], found["requests"]
        self.row(
            what,
            seconds,
            data_bytes,
            f"{pushed['read_bytes'] / MIB:.1f} MiB read, {pushed['sent_bytes'] / MIB:.2f} MiB in packs, "
            f"{requests['bytes_up'] / MIB:.2f} MiB up in {requests['puts']} puts, {requests['gets']} gets, "
            f"{requests['lists']} lists",
        )

    def pull(self) -> None:
        create_pool(self.work / "whole", size_bytes=4 << 30)
        seconds, _ = self.thinpool("pull", self.url, self.work / "whole", "disk", "--snapshot", "first")
        self.row("pull into an idle pool", seconds, self.mapped_bytes)
        shutil.rmtree(self.work / "whole")

    def pull_lazily(self) -> None:
        """From nothing to the first file: begin, serve, attach, mount, read."""
        create_pool(self.work / "lazy", size_bytes=4 << 30)
        begun = time.monotonic()
        self.thinpool("pull", self.url, self.work / "lazy", "disk", "--snapshot", "first", "--lazy")
        pulled = time.monotonic() - begun
        self.thinpool("serve", self.work / "lazy", "--detach")
        uri = f"nbd+unix:///disk?socket={self.work}/lazy/nbd.sock"
        try:
            self._first_reads(uri, begun, pulled)
        finally:
            if os.geteuid() == 0:
                self.thinpool("detach", self.work / "lazy", "disk")
            self.thinpool("stop", self.work / "lazy")

    def _first_reads(self, uri: str, begun: float, pulled: float) -> None:
        self.timed("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", uri)
        readable = time.monotonic() - begun
        mounted = "not mounted (needs root)"
        if os.geteuid() == 0:
            place = self.work / "mnt"
            place.mkdir()
            self.thinpool("attach", self.work / "lazy", "disk", "--mount", place)
            text = (place / "first-file").read_text()
            mounted = f"first file read after {time.monotonic() - begun:.2f} s ({text.strip()})"
        self.lines.append(
            f"\nLazy pull of the 10 GiB image: the command took {pulled:.2f} s, the first block could be read after "
            f"{readable:.2f} s, {mounted}."
        )
        self._wait_lazily()

    def _wait_lazily(self) -> None:
        begun_waiting = time.monotonic()
        self.thinpool("pull", self.url, self.work / "lazy", "disk", "--snapshot", "first")
        self.lines.append(f"Everything was there {time.monotonic() - begun_waiting:.2f} s later.")

    def collect(self) -> None:
        seconds, output = self.thinpool("gc", self.url, "--grace", "0", "--json")
        requests = json.loads(output)["requests"]
        self.lines.append(
            f"`gc` with two snapshots: {seconds:.2f} s, {requests['gets']} gets, {requests['lists']} lists, "
            f"{requests['bytes_down']} bytes read."
        )
        manifests = sorted((self.work / "store" / "snapshots").iterdir())
        sizes = ", ".join(str(path.stat().st_size) for path in manifests)
        self.lines.append(f"Manifests: {sizes} bytes.")


def run(work: Path, *, data_bytes: int) -> list[str]:
    """Measure everything once."""
    bench = Bench(work, data_bytes)
    bench.make_image()
    bench.lines += [
        f"An ext4 image of {IMAGE_BYTES >> 30} GiB with {bench.mapped_bytes / MIB:.0f} MiB mapped, made of this "
        "machine's files; everything in the page cache; the store is a directory and every object is flushed to disk.",
        "",
        "| what | seconds | MiB of mapped data a second | |",
        "|---|---|---|---|",
    ]
    bench.alone()
    bench.push("first", bench.mapped_bytes, "first push")
    changed = bench.change("second")
    bench.push("second", changed, "increment, 1 % of blocks changed at random")
    shutil.rmtree(work / "cache")
    bench.thinpool("forget", bench.url, "second")
    bench.push("second", bench.mapped_bytes, "the same by a full scan (no base known)")
    bench.pull()
    bench.pull_lazily()
    bench.collect()
    return bench.lines + size_lines()


def size_lines() -> list[str]:
    """What the tables of 1 TiB take, encoded by the real code: all of it mapped, no chunk compressible or known."""
    push = secrets.token_bytes(12)

    def pack(number: int) -> bytes:
        return push + number.to_bytes(4, "big")

    chunk_stored = 65537
    chunks_a_pack = -(-(PACK_BYTES - len(PACK_HEAD)) // chunk_stored)
    first = {
        position: Place(
            pack(position // chunks_a_pack),
            len(PACK_HEAD) + position % chunks_a_pack * chunk_stored,
            chunk_stored,
            secrets.token_bytes(32),
        )
        for position in range(1024)
    }
    segment = len(compressed(Segment(first).encode()))
    segments_a_pack = PACK_BYTES // segment
    packs = (1 << 24) // chunks_a_pack
    about = Description("disk-monday", "0" * 36, 1 << 40, 65536, 1 << 40, 1 << 40, 1.0, 1.0, "host")
    manifest = Manifest(about)
    for number in range(1 << 14):
        place = pack(packs + number // segments_a_pack)
        offset = len(PACK_HEAD) + number % segments_a_pack * segment
        manifest.segments[number] = Place(place, offset, segment, secrets.token_bytes(32))
        manifest.packs[place] += segment
    for number in range(packs):
        manifest.packs[pack(number)] = chunks_a_pack * chunk_stored
    length = len(compressed(manifest.encode()))
    return [
        "",
        "Sizes of the tables of 1 TiB, all of it mapped and incompressible, made by the code itself:",
        "",
        f"- a segment (64 MiB): {segment} bytes; all 16384: {segment * 16384 / MIB:.0f} MiB",
        f"- a manifest: {length} bytes, naming {len(manifest.packs)} packs",
    ]
