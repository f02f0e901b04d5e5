"""The runner itself: what it carries back, what it gives the guest, and that it survives what tests do to it."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from tests.guest.machine import HOST, GuestDiedError, GuestJobError, Machine


def test_status_and_both_outputs_come_back(guest: Machine):
    done = guest.run("echo out; echo err >&2; exit 7", check=False)
    assert (done.status, done.out, done.err) == (7, "out\n", "err\n")
    with pytest.raises(GuestJobError, match=r"status 1\nbefore"):
        guest.run("echo before; false; echo after")


def test_jobs_run_side_by_side_and_a_late_one_is_killed(guest: Machine):
    slow = guest.start("echo begun; sleep 600 & wait")
    assert guest.run("echo quick").out == "quick\n"
    assert slow.is_running()
    with pytest.raises(GuestJobError, match="took more than"):
        slow.wait(0.2)
    assert not slow.is_running()
    assert guest.run("pgrep -x sleep", check=False).status == 1


def test_nothing_that_the_guest_writes_reaches_the_host(guest: Machine, tmp_path: Path):
    guest.run(f"echo changed > {tmp_path}/file; cat {tmp_path}/file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_disk_comes_and_goes(guest: Machine, tmp_path: Path, block_bytes: int):
    image = tmp_path / "image"
    image.write_bytes(b"host" + bytes((4 << 20) - 4))
    disk = guest.attach("image", image, block_bytes=block_bytes)
    done = guest.run(
        f"head -c 4 {disk.path}; blockdev --getss {disk.path}; echo guest | dd of={disk.path} conv=notrunc status=none"
    )
    assert done.out == f"host{block_bytes}\n"
    guest.detach(disk)
    assert image.read_bytes()[:6] == b"guest\n"


def test_the_guest_reaches_the_hosts_loopback(guest: Machine, tmp_path: Path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello guest")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert guest.run(f"busybox wget -qO- http://{HOST}:{server.server_port}/").out == "hello guest"
    finally:
        server.shutdown()
        server.server_close()


def test_a_power_cut_ends_the_guest_and_it_boots_again(guest: Machine):
    guest.start("sleep 600")
    guest.power_cut()
    with pytest.raises(GuestDiedError):
        guest.run("true")
    guest.boot()
    assert guest.run("echo back").out == "back\n"
