"""One guest for all tests of this directory, which therefore run on one worker, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.machine import GuestUnavailableError, Machine, make_machine

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before the groups are made into work
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.peer)
            item.add_marker(pytest.mark.xdist_group("guest"))


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    try:
        machine = make_machine()
    except GuestUnavailableError as error:
        pytest.skip(str(error))
    yield machine
    machine.close()


@pytest.fixture
def guest(machine: Machine) -> Iterator[Machine]:
    """The running guest, with nothing in it from other tests."""
    if not machine.is_alive():
        machine.boot()
    yield machine
    machine.settle()
