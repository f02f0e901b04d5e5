"""Serving under a supervisor: socket activation, readiness, pid file, parent, socket owner and mode, TLS rules."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbd import NbdError
from nbd.client import Client
from nbd.uri import unix_uri

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "thinpool"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "p"
    for arguments in (["init", str(path), "--size", "64M"], ["create", str(path), "disk", "--size", "8M"]):
        subprocess.run([*COMMAND, *arguments], cwd=CHECKOUT, check=True, capture_output=True)
    return path


@contextmanager
def serving(pool: Path, *options: str, environment: dict[str, str] | None = None, before: str = ""):
    """`thinpool serve` in the foreground, ready; `before` is shell text run in the same process first."""
    words = " ".join(f"'{word}'" for word in [*COMMAND, "serve", str(pool), *options])
    server = subprocess.Popen(
        ["bash", "-c", f"{before}exec {words}"],
        cwd=CHECKOUT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(3,) if "LISTEN_FDS" in (environment or {}) else (),
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("nbd"), line + (server.stderr.read() if server.poll() is not None else "")
        yield server, line.strip()
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_pid_file_mode_and_readiness(pool: Path, tmp_path: Path):
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(10)
    pid_file = tmp_path / "pid"
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    options = ("--pid-file", str(pid_file), "--socket-mode", "0660", "--socket", str(tmp_path / "s"))
    with serving(pool, *options, environment=environment) as (server, _):
        assert int(pid_file.read_text()) == server.pid
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
        assert notify.recv(1000).startswith(b"READY=1\n")
    assert notify.recv(1000) == b"STOPPING=1"
    assert not pid_file.exists()
    assert not (tmp_path / "s").exists()
    notify.close()


def test_socket_activation(pool: Path, tmp_path: Path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "activated"))
    listener.listen()
    assert listener.fileno() >= 3
    kept = os.dup(3) if listener.fileno() != 3 else None
    try:
        os.dup2(listener.fileno(), 3)
        with serving(pool, environment={"LISTEN_FDS": "1"}, before="export LISTEN_PID=$$; ") as (_, uri):
            assert str(tmp_path / "activated") in uri
            assert not (pool / "nbd.sock").exists()
            client = Client.connect(uri)
            client.write(0, b"x" * 512)
            client.close()
    finally:
        if kept is not None:
            os.dup2(kept, 3)
            os.close(kept)
        listener.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_exit_with_parent(pool: Path):
    script = f"{' '.join(COMMAND)} serve '{pool}' --exit-with-parent >/dev/null 2>&1 & echo $!; read -r _"
    parent = subprocess.Popen(
        ["bash", "-c", script], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while not (pool / "nbd.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
    assert not (pool / "control").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--tls-optional"],
        ["--allow", "disk=alice"],
        ["--tls-verify-peer"],
        ["--tls-certificates", "a", "--tls-psk", "b"],
        ["--socket-mode", "999"],
        ["--socket-owner", "no-such-user-here"],
        ["--exit-with-parent", "--detach"],
        ["--listen", "localhost:port"],
    ],
)
def test_options_that_do_not_fit_are_refused(pool: Path, options: list[str]):
    done = subprocess.run(
        [*COMMAND, "serve", str(pool), *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (pool / "control").exists()


@pytest.mark.parametrize(
    "options", [["--tls-certificates", "none"], ["--default-export", "none"], ["--socket", "/no/s"]]
)
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(pool: Path, options: list[str]):
    for detach in ([], ["--detach"]):
        done = subprocess.run(
            [*COMMAND, "serve", str(pool), *options, *detach],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode not in {0, 2}, done.stderr
        assert "Traceback" not in done.stderr
        assert not (pool / "control").exists()
        assert not (pool / "nbd.sock").exists()


def test_listing_can_be_turned_off_and_connections_limited(pool: Path):
    with serving(pool, "--no-list", "--max-connections", "1"):
        socket_path = pool / "nbd.sock"
        first = Client.connect(unix_uri(socket_path, "disk"))
        assert first.read(0, 16) == bytes(16)
        with pytest.raises((OSError, NbdError)):
            Client.connect(unix_uri(socket_path, "disk"))
        first.close()
