"""A store that can go away and come back: a directory that is moved, or obstore's memory behind a switch."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinpool.store import backends
from thinpool.store.backends import open_objects
from thinpool.store.objects import Backend, PassingError
from thinpool.store.store import Store


class Switched:
    """A backend that fails, in the way that may pass, for as long as `away` is set."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.away = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.inner, name)

        def switched(*arguments: Any, **named: Any) -> Any:
            if self.away:
                raise PassingError("switched off")
            return call(*arguments, **named)

        return switched


class StorePlace:
    """A new store: in a directory below `work`, or in memory where there is none."""

    def __init__(self, work: Path | None, secret: bytes | None = None) -> None:
        self._directory = None if work is None else work / "store"
        self.secret = secret
        self._switch: Switched | None = None
        if self._directory is not None:
            self.url = self._directory.as_uri()
        else:
            self.url = f"memory://{secrets.token_hex(8)}"
            self._switch = Switched(open_objects(self.url)._backend)
            backends._memories[self.url] = self._switch
        self.is_away = False
        self.store = Store.open(self.url, secret, create=True)

    def go_away(self) -> None:
        """From now on nothing is found there."""
        self.is_away = True
        if self._switch is not None:
            self._switch.away = True
        else:
            assert self._directory is not None
            self._directory.rename(self._directory.with_name("store-away"))

    def come_back(self) -> None:
        """It is there again, as it was."""
        self.is_away = False
        if self._switch is not None:
            self._switch.away = False
        else:
            assert self._directory is not None
            self._directory.with_name("store-away").rename(self._directory)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Away for a while, whether it was before or not."""
        before = self.is_away
        if not before:
            self.go_away()
        try:
            yield
        finally:
            if not before:
                self.come_back()

    def end(self) -> None:
        """Memory is given back; a directory belongs to whoever made it."""
        backends._memories.pop(self.url, None)
