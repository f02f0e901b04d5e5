"""Hosts, collectors, readers and kills around one store, all of them processes: a few rounds; two hundred in deep mode.

`tools/store-rounds` makes as many as one likes. docs/object-storage.md has figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.s3_server import S3Server
from tests.fakes.store_rounds import Rounds

pytest.importorskip("obstore", reason="needs the package obstore")


def _run(work: Path, url: str, rounds: int, seed: int = 0) -> Rounds:
    made = Rounds(work, url, seed)
    for _ in range(rounds):
        made.run()
    made.finish()
    assert made.totals.pushes >= rounds
    assert made.totals.collections >= rounds
    return made


@pytest.mark.deep
def test_two_hosts_push_and_others_collect_as_processes(tmp_path: Path) -> None:
    _run(tmp_path, (tmp_path / "store").as_uri(), 2)


@pytest.mark.deep
@pytest.mark.timeout(7200)
def test_two_hundred_rounds_on_a_directory(tmp_path: Path) -> None:
    totals = _run(tmp_path, (tmp_path / "store").as_uri(), 200).totals
    assert (
        min(totals.pushes_killed, totals.collections_killed, totals.pushes_asleep, totals.packs_deleted) > 0
    )


@pytest.mark.deep
@pytest.mark.peer
@pytest.mark.timeout(7200)
def test_two_hundred_rounds_on_a_real_s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        totals = _run(tmp_path, "s3://bucket/fleet", 200).totals
    finally:
        server.stop()
    assert (
        min(totals.pushes_killed, totals.collections_killed, totals.pushes_asleep, totals.packs_deleted) > 0
    )
