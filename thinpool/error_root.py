"""The root of thinpool's errors: fields, exit code and JSON form that every leaf of `errors.py` shares.

In: `ExitCode`, `ThinPoolError`, and the decorator that makes a leaf class and registers it by name.
Out: the leaves and their sentences (`errors.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, TypeVar, dataclass_transform


class ExitCode(IntEnum):
    """What a command's exit status means; documented in docs/cli.md."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    NO_SPACE = 5
    DAMAGED = 6
    SERVER = 7
    RESOURCES = 8
    INTERRUPTED = 130


class ThinPoolError(Exception):
    """Root of everything this package raises on purpose."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE

    def __reduce__(self) -> tuple[type[ThinPoolError], tuple[Any, ...]]:
        # Exceptions pickle by `args`, which is empty when the fields were given by keyword.
        return type(self), tuple(self.to_fields().values())

    def to_fields(self) -> dict[str, Any]:
        """Return the fields in declaration order, JSON-able."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Return the form the control API and `--json` use; `from_json` turns it back."""
        return {
            "error": type(self).__name__,
            "fields": self.to_fields(),
            "message": str(self),
            "exit_code": int(self.exit_code),
        }


Leaf = TypeVar("Leaf", bound=type[ThinPoolError])
LEAVES: dict[str, type[ThinPoolError]] = {}


@dataclass_transform(eq_default=False)
def leaf(exit_code: ExitCode) -> Callable[[Leaf], Leaf]:
    """Return the decorator of a leaf: a dataclass, known by its name, ending a command with `exit_code`."""

    def register(cls: Leaf) -> Leaf:
        cls.exit_code = exit_code
        # Compared and hashed by identity, as exceptions are.
        dataclass(eq=False)(cls)
        LEAVES[cls.__name__] = cls
        return cls

    return register
