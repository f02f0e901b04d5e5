"""Pytest plugin: keeps tests that need the whole machine on one worker, and refuses missing peers where asked to.

With THINPOOL_REQUIRE_PEERS=1 a skipped test fails when it is marked ``peer`` or ``root`` or when its reason says that
something is missing. Two kinds of skip stay what they are: tests of the deep mode, and reasons that begin with
``machine:``, which name a property of the machine that no package can change (no kernel nbd driver, for example).
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

REQUIRED = os.environ.get("THINPOOL_REQUIRE_PEERS", "") not in ("", "0")
MISSING = re.compile(
    r"(?i)\bmissing\b|not installed|not found|not available|unavailable|\bneeds?\b|\brequires?\b"
)
EXEMPT = re.compile(r"(?i)^(skipped: )?\s*(machine:|deep\b)")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr or "")


def _is_missing_peer(reason: str, *, marked: bool) -> bool:
    text = reason.removeprefix("Skipped: ")
    return not EXEMPT.match(text) and (marked or MISSING.search(text) is not None)


def _refuse(report: pytest.TestReport | pytest.CollectReport, reason: str) -> None:
    report.outcome = "failed"
    report.longrepr = f"skipped where peers are required (THINPOOL_REQUIRE_PEERS=1): {reason}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test marked ``root`` into one xdist group: they share loop devices and mounts."""
    for item in items:
        if item.get_closest_marker("root") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("root"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: object, ids: list[str]) -> None:
    """Refuse to run groups apart: pytest-xdist writes the group behind the name, and some pytest may not take it."""
    apart = [name for name in ids if name.startswith("tests/guest/") and "@" not in name]
    if apart and node.config.getoption("dist") == "loadgroup":  # type: ignore[attr-defined]
        pytest.exit(
            f"this pytest-xdist does not keep {apart[0]} with its group (another pytest?)", returncode=4
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a test into a failure where a missing peer is the cause."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        marked = any(item.get_closest_marker(name) for name in ("peer", "root"))
        reason = _reason(report)
        if not item.get_closest_marker("deep") and _is_missing_peer(reason, marked=marked):
            _refuse(report, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Treat a module that skips itself as a whole the same way."""
    report = yield
    if REQUIRED and report.skipped and _is_missing_peer(_reason(report), marked=False):
        _refuse(report, f"{collector.nodeid}: {_reason(report)}")
    return report
