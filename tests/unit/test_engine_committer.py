"""Group commit: a flush is covered by a commit that started after it; failures reach every waiter."""

import threading
import time

import pytest

from thinpool.committer import Committer


def test_flushes_that_arrive_during_a_commit_share_the_next_one():
    started, release = threading.Semaphore(0), threading.Semaphore(0)
    runs: list[int] = []

    def commit() -> None:
        runs.append(len(runs))
        started.release()
        release.acquire()

    committer = Committer(commit, lambda: None)
    first = threading.Thread(target=committer.flush)
    first.start()
    started.acquire()
    others = [threading.Thread(target=committer.flush) for _ in range(5)]
    for thread in others:
        thread.start()
    time.sleep(0.05)
    release.release()
    started.acquire()
    assert all(thread.is_alive() for thread in others), "covered by a commit that began before them"
    release.release()
    for thread in [first, *others]:
        thread.join(5)
        assert not thread.is_alive()
    assert len(runs) == 2


def test_a_failure_reaches_the_flusher_and_those_that_waited():
    started, release = threading.Semaphore(0), threading.Semaphore(0)
    caught: list[str] = []

    def commit() -> None:
        started.release()
        release.acquire()
        raise OSError(5, "broken")

    committer = Committer(commit, lambda: None)

    def flush() -> None:
        try:
            committer.flush()
        except OSError as error:
            caught.append(str(error))

    threads = [threading.Thread(target=flush) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        started.acquire()
        time.sleep(0.05)
        release.release()
    for _ in range(2):
        release.release()
    for thread in threads:
        thread.join(5)
    assert len(caught) == 3


def test_touching_commits_within_a_second_or_so_and_idling_does_not():
    runs: list[float] = []
    reclaimed: list[float] = []
    committer = Committer(lambda: runs.append(time.monotonic()), lambda: reclaimed.append(time.monotonic()))
    committer.start()
    committer.touch()
    deadline = time.monotonic() + 10
    while not reclaimed and time.monotonic() < deadline:
        time.sleep(0.02)
    committer.stop()
    assert len(runs) == 1
    assert len(reclaimed) == 1


def test_flush_after_stop_still_commits():
    runs: list[int] = []
    committer = Committer(lambda: runs.append(1), lambda: None)
    committer.start()
    committer.stop()
    committer.flush()
    assert runs == [1]


@pytest.mark.parametrize("count", [1, 3])
def test_each_separate_flush_is_one_commit(count: int):
    runs: list[int] = []
    committer = Committer(lambda: runs.append(1), lambda: None)
    for _ in range(count):
        committer.flush()
    assert len(runs) == count
