"""Commands on a served pool: each works as on an idle one, the server idles without a single wake-up, stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.warm_thinpool import warm_thinpool

CHECKOUT = Path(__file__).resolve().parents[2]


def run(*arguments: str, code: int = 0) -> str:
    done = warm_thinpool(*arguments, environment={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stderr if code else done.stdout).decode()


@pytest.fixture
def served(tmp_path: Path):
    pool = tmp_path / "p"
    run("init", str(pool), "--size", "64M")
    run("serve", str(pool), "--detach")
    pid = json.loads(run("status", str(pool), "--json"))["server"]["pid"]
    yield pool, pid
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)


def names(pool: Path) -> set[str]:
    return {device["name"] for device in json.loads(run("list", str(pool), "--json"))["devices"]}


def test_the_same_commands_with_and_without_a_server(served, tmp_path: Path):
    pool, _ = served
    idle = tmp_path / "idle"
    run("init", str(idle), "--size", "64M")
    script = [
        (["create", "a", "--size", "8M"], 0),
        (["create", "a", "--size", "8M"], 4),
        (["snapshot", "a", "s", "--read-only"], 0),
        (["snapshot", "none", "t"], 3),
        (["snapshot", "a", "larger", "--size", "9M"], 0),
        (["snapshot", "a", "smaller", "--size", "7M"], 2),
        (["rename", "a", "b"], 0),
        (["rename", "b", "larger"], 4),
        (["rename", "b", "larger", "--exchange"], 0),
        (["rename", "b", "nobody", "--exchange"], 3),
        (["rename", "larger", "b", "--exchange"], 0),
        (["delete", "larger"], 0),
        (["resize", "b", "--size", "16M"], 0),
        (["rollback", "b", "s", "--keep", "old"], 0),
        (["delete", "old"], 0),
        (["create", "r", "--size", "64M", "--reserve", "40M"], 0),
        (["reserve", "b", "8M"], 0),
        (["reserve", "b", "9M"], 2),
        (["reserve", "s", "1M"], 2),
        (["create", "t", "--size", "64M", "--reserve", "17M"], 5),
        (["reserve", "b", "none"], 0),
        (["delete", "r"], 0),
        (["delete", "old"], 3),
        (["grow", "--size", "128M"], 0),
        (["grow", "--size", "1M"], 2),
    ]
    for (command, *rest), code in script:
        said = [
            run(command, str(place), *rest, code=code).replace(str(place), "POOL") for place in (pool, idle)
        ]
        assert said[0] == said[1]
    assert names(pool) == names(idle) == {"b", "s"}
    run("stop", str(pool))
    assert names(pool) == {"b", "s"}


def switches(pid: int) -> int:
    """How often any thread of a process has gone to sleep."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def test_an_idle_server_does_not_wake_up(served):
    pool, pid = served
    run("create", str(pool), "a", "--size", "8M")
    time.sleep(2.5)  # the last commit, and the keep-alive of the last command
    before = switches(pid)
    time.sleep(2)
    assert switches(pid) - before <= 4


def test_a_second_server_is_refused_and_a_killed_one_leaves_nothing_in_the_way(served):
    pool, pid = served
    assert str(pid) in run("serve", str(pool), "--detach", code=4)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/fd").exists() and time.monotonic() < deadline:
        try:
            if not list(Path(f"/proc/{pid}/fd").iterdir()):
                break
        except OSError:
            break
        time.sleep(0.01)
    run("create", str(pool), "a", "--size", "8M")
    run("serve", str(pool), "--detach")
    assert names(pool) == {"a"}
    run("stop", str(pool))


def test_sigterm_stops_the_server_and_removes_its_sockets(served):
    pool, pid = served
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 15
    while (pool / "control").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not (pool / "control").exists()
    assert not (pool / "nbd.sock").exists()
    assert "not being served" in run("stop", str(pool), code=7)
