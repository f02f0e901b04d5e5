"""How a deliberate mistake is made: a function of the real code is replaced for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock


def instead(owner: object, name: str, function: object) -> AbstractContextManager[object]:
    return mock.patch.object(owner, name, function)
