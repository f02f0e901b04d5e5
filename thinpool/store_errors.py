# ruff: noqa: N818 -- the names say what happened, as `NoSpace`; an Error suffix adds nothing to them
"""Errors about object stores and the snapshots in them. See `errors.py` for the rules of all leaves."""

from __future__ import annotations

from .error_root import ExitCode, ThinPoolError, leaf
from .wording import escaped, quoted


@leaf(ExitCode.USAGE)
class BadStoreUrl(ThinPoolError):
    """A URL that names no object store, or one whose settings are not accepted."""

    url: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{quoted(self.url)} is no URL of an object store ({escaped(self.reason)}); "
            "use for example s3://bucket/prefix or file:///srv/store"
        )


@leaf(ExitCode.FAILURE)
class StoreExtraMissing(ThinPoolError):
    """The packages behind object storage are not installed."""

    package: str

    def __str__(self) -> str:
        return f"object storage needs the package {self.package}; install thinpool[store]"


@leaf(ExitCode.SERVER)
class StoreUnreachable(ThinPoolError):
    """The store did not answer, or failed, however often it was asked. Nothing is lost: run the command again."""

    url: str
    key: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the store {escaped(self.url)} does not answer for {escaped(self.key)}: {escaped(self.reason)}; "
            "what was done stays, run the command again when the store is back"
        )


@leaf(ExitCode.FAILURE)
class StoreRefused(ThinPoolError):
    """The store refused, and asking again would not help."""

    url: str
    key: str
    reason: str

    def __str__(self) -> str:
        local = self.url.startswith("file:")
        advice = "check the credentials, their rights, and that the bucket exists"
        return (
            f"the store {escaped(self.url)} refuses access to {escaped(self.key)}: {escaped(self.reason)}; "
            f"{'check that it is mounted, and who may write there' if local else advice}"
        )


@leaf(ExitCode.NO_SPACE)
class StoreFull(ThinPoolError):
    """The store has no room for another object. What it holds is as it was."""

    url: str
    key: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the store {escaped(self.url)} has no room for {escaped(self.key)}: {escaped(self.reason)}; "
            "make room there (`thinpool forget`, then `thinpool gc --grace 0`) and run the command again; "
            "it goes on where it was"
        )


@leaf(ExitCode.NOT_FOUND)
class NotAStore(ThinPoolError):
    """Nothing of ours is under the URL."""

    url: str

    def __str__(self) -> str:
        return f"there is no thinpool store at {escaped(self.url)}; the first `thinpool push` makes one"


@leaf(ExitCode.DAMAGED)
class StoreDamaged(ThinPoolError):
    """An object is missing or is not what was written."""

    url: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"the object {escaped(self.key)} of the store {escaped(self.url)} is damaged: {escaped(self.reason)}"


@leaf(ExitCode.USAGE)
class StoreKeyNeeded(ThinPoolError):
    """The store is encrypted and no key was given, or the other way round."""

    url: str
    reason: str

    def __str__(self) -> str:
        return f"the store {escaped(self.url)} {escaped(self.reason)}"


@leaf(ExitCode.FAILURE)
class WrongStoreKey(ThinPoolError):
    """The key does not open the store."""

    url: str

    def __str__(self) -> str:
        return f"the key does not open the store {escaped(self.url)}; nothing was read or changed"


@leaf(ExitCode.NOT_FOUND)
class NoSuchStoredSnapshot(ThinPoolError):
    """The store holds no snapshot of that name."""

    name: str
    url: str

    def __str__(self) -> str:
        return (
            f"no snapshot {quoted(self.name)} in the store {escaped(self.url)}; `thinpool ls URL` lists them"
        )


@leaf(ExitCode.CONFLICT)
class BaseNotStored(ThinPoolError):
    """A pull cannot leave out what a device of the pool has: the store does not know that content."""

    name: str
    url: str
    changed: bool = False

    def __str__(self) -> str:
        if self.changed:
            return (
                f"{quoted(self.name)} may have changed since it was pulled, received or snapshotted, so it is no base; "
                "name a read-only snapshot; nothing was changed"
            )
        return (
            f"no snapshot in the store {escaped(self.url)} has the content of {quoted(self.name)}; pull without "
            "--base, or name a snapshot that pool and store both have; nothing was changed"
        )


@leaf(ExitCode.CONFLICT)
class StoredSnapshotExists(ThinPoolError):
    """The store holds another snapshot of that name."""

    name: str
    url: str

    def __str__(self) -> str:
        return (
            f"a snapshot {quoted(self.name)} is in the store {escaped(self.url)} already; "
            "nothing was changed. Choose another name with --as, or `thinpool forget` the old one first"
        )


@leaf(ExitCode.CONFLICT)
class DeviceIncomplete(ThinPoolError):
    """A device whose content is still being fetched from a store cannot be used for this."""

    name: str
    remote_bytes: int

    def __str__(self) -> str:
        return (
            f"device {quoted(self.name)} is still being fetched ({self.remote_bytes} bytes to go); "
            "serve the pool, or run `thinpool pull` again, until it is complete"
        )


@leaf(ExitCode.CONFLICT)
class DeviceNotFrozen(ThinPoolError):
    """Only what cannot change any more can be pushed."""

    name: str

    def __str__(self) -> str:
        return (
            f"device {quoted(self.name)} may still change; snapshot it with `thinpool snapshot --read-only` "
            "and push the snapshot"
        )


@leaf(ExitCode.CONFLICT)
class NotBeingPulled(ThinPoolError):
    """A device that is complete is not dropped by aborting."""

    name: str

    def __str__(self) -> str:
        return f"device {quoted(self.name)} is complete; `thinpool delete` deletes it"
