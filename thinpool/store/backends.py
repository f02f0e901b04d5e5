"""The services behind a URL: a local directory, and everything obstore speaks (S3, GCS, Azure, memory).

In: their calls as `objects.Backend`, their exceptions in our three kinds. Out: retries and sentences (`objects.py`).

The directory is our own because a push that was reported done must survive a power cut: obstore's local store renames
its files into place and does not flush them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from thinpool.errors import BadStoreUrl, StoreExtraMissing

from .objects import AbsentError, Backend, FullError, Listed, Objects, PassingError, RefusedError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PARTIAL_SUFFIX = ".partial"
# Ours: in a directory that a store shares with other files, those are left alone.
PARTIAL_NAME = re.compile(r"\.[0-9a-f]{16}\.partial\Z")
CLOCK = "clock/"
# Inside one attempt of ours; a server that is gone is noticed by us, not by obstore's minutes of patience.
CLIENT_RETRIES = 2
CLIENT_RETRY_SECONDS = 20
REQUEST_SECONDS = 60
CONNECT_SECONDS = 5
DELETE_KEYS_MAX = 1000
REFUSALS = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError")
# How object_store words a range that begins behind the end: services by their status, its memory store by itself.
BEYOND_THE_END = ("status code: 416 ", "but object was only ")
# Asked for credentials by clients that were given none.
METADATA_SERVICES = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_memories: dict[str, Backend] = {}


def is_store_url(text: str) -> bool:
    """Whether a word on a command line means an object store rather than a pool."""
    return "://" in text


def open_objects(url: str) -> Objects:
    """The objects below a URL; nothing is asked of the store yet. Raises BadStoreUrl, StoreExtraMissing."""
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise BadStoreUrl(url, "it has no scheme")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise BadStoreUrl(url, "a local store is file:///absolute/path")
        return Objects(url, DirectoryBackend(Path(unquote(parts.path))))
    if parts.scheme == "memory":
        if url not in _memories:
            _memories[url] = ObstoreBackend(_obstore_store("memory:///", url))
        return Objects(url, _memories[url])
    return Objects(url, ObstoreBackend(_obstore_store(url, url)))


def _obstore_store(address: str, url: str) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreExtraMissing(package="obstore") from None
    options: dict[str, Any] = {}
    if not address.startswith("memory:"):
        # The environment says more: AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, GOOGLE_*, AZURE_*.
        options["client_options"] = {
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            **({"allow_http": True} if os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true" else {}),
        }
        options["retry_config"] = {
            "max_retries": CLIENT_RETRIES,
            "retry_timeout": timedelta(seconds=CLIENT_RETRY_SECONDS),
        }
    try:
        return from_url(address, **options)
    except Exception as error:
        raise BadStoreUrl(url, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ObstoreBackend:
    """A store of obstore."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, key: str, data: bytes, *, create: bool) -> bool:
        """See `objects.Backend`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            # In one request: packs are small enough, and a condition holds for single requests only.
            obstore.put(self._store, key, data, mode="create" if create else "overwrite", use_multipart=False)
        except AlreadyExistsError:
            return False
        except FileNotFoundError as error:
            raise RefusedError(_first_line(error)) from error
        except Exception as error:
            raise _kind(error) from error
        return True

    def get(self, key: str, offset: int, length_bytes: int | None) -> bytes:
        """See `objects.Backend`."""
        import obstore

        try:
            if length_bytes is None:
                return bytes(obstore.get(self._store, key).bytes())
            return bytes(obstore.get_range(self._store, key, start=offset, length=length_bytes))
        except FileNotFoundError:
            raise AbsentError(key) from None
        except Exception as error:
            if _beyond_the_end(error):
                return b""
            raise _kind(error) from error

    def head(self, key: str) -> Listed:
        """See `objects.Backend`."""
        import obstore

        try:
            found = obstore.head(self._store, key)
        except FileNotFoundError:
            raise AbsentError(key) from None
        except Exception as error:
            raise _kind(error) from error
        return Listed(key, found["size"], found["last_modified"].timestamp())

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `objects.Backend`."""
        import obstore

        try:
            found = [
                Listed(item["path"], item["size"], item["last_modified"].timestamp())
                for page in obstore.list(self._store, prefix)
                for item in page
            ]
        except FileNotFoundError as error:
            raise RefusedError(_first_line(error)) from error
        except Exception as error:
            raise _kind(error) from error
        return iter(sorted(found, key=lambda item: item.key))

    def delete(self, keys: Sequence[str]) -> None:
        """See `objects.Backend`."""
        import obstore

        for first in range(0, len(keys), DELETE_KEYS_MAX):
            try:
                obstore.delete(self._store, list(keys[first : first + DELETE_KEYS_MAX]))
            except FileNotFoundError:
                if len(keys) > 1:
                    for key in keys[first : first + DELETE_KEYS_MAX]:
                        self.delete([key])
            except Exception as error:
                raise _kind(error) from error

    def now(self) -> float:
        """See `objects.Backend`. An object is written and its date looked at."""
        key = CLOCK + secrets.token_hex(8)
        self.put(key, b"\n", create=False)
        try:
            return self.head(key).modified
        except AbsentError as error:
            raise PassingError(key) from error  # another collector swept it away
        finally:
            self.delete([key])

    def sweep(self, before: float) -> int:
        """See `objects.Backend`. An object is there whole or not at all; what asks for the time may be killed."""
        left = [item.key for item in self.list(CLOCK) if item.modified < before]
        if left:
            self.delete(left)
        return len(left)


def _kind(error: Exception) -> Exception:
    if type(error).__name__ in REFUSALS:
        return RefusedError(_first_line(error))
    reason = _first_line(error)
    if any(address in reason for address in METADATA_SERVICES):
        reason = f"no credentials are in the environment, and no role of this machine is to be had ({reason})"
    return PassingError(reason)


def _beyond_the_end(error: Exception) -> bool:
    # Whole phrases: addresses, names of packs and durations are in these texts too, and have any digits.
    reason = _first_line(error)
    return any(phrase in reason for phrase in BEYOND_THE_END)


class DirectoryBackend:
    """Objects as files below a directory, each durable before `put` returns."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes, *, create: bool) -> bool:
        """See `objects.Backend`. A file appears by link or rename, after it was flushed."""
        target = self._root / key
        partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        try:
            self._make_directory(target.parent)
            try:
                self._write(partial, data)
                try:
                    if create:
                        os.link(partial, target)
                    else:
                        partial.rename(target)
                except FileNotFoundError as error:
                    # A collector took the file for one that a killed push had left. It is written again.
                    raise PassingError(str(error)) from error
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
            _sync_directory(target.parent)
        except OSError as error:
            raise _file_kind(error) from error
        return True

    def _make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        if path.parent != path:
            self._make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def get(self, key: str, offset: int, length_bytes: int | None) -> bytes:
        """See `objects.Backend`."""
        try:
            with (self._root / key).open("rb") as file:
                file.seek(offset)
                return file.read() if length_bytes is None else file.read(length_bytes)
        except (FileNotFoundError, NotADirectoryError):
            raise AbsentError(key) from None
        except OSError as error:
            raise _file_kind(error) from error

    def head(self, key: str) -> Listed:
        """See `objects.Backend`."""
        try:
            found = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise AbsentError(key) from None
        except OSError as error:
            raise _file_kind(error) from error
        return Listed(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `objects.Backend`."""
        found: list[Listed] = []
        try:
            for directory, _, names in os.walk(self._root / prefix.rstrip("/"), onerror=_unlisted):
                for name in names:
                    path = Path(directory, name)
                    if name.endswith(PARTIAL_SUFFIX):
                        continue
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue  # deleted meanwhile
                    key = path.relative_to(self._root).as_posix()
                    found.append(Listed(key, status.st_size, status.st_mtime))
        except OSError as error:
            raise _file_kind(error) from error
        return iter(sorted(found, key=lambda item: item.key))

    def delete(self, keys: Sequence[str]) -> None:
        """See `objects.Backend`."""
        try:
            for key in keys:
                (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _file_kind(error) from error

    def now(self) -> float:
        """See `objects.Backend`. A full file system can still tell: nothing is written."""
        try:
            os.utime(self._root)  # now by the clock of the file server, where it is one
            return self._root.stat().st_mtime
        except OSError as error:
            raise _file_kind(error) from error

    def sweep(self, before: float) -> int:
        """See `objects.Backend`. Files that were not complete when their writer was killed."""
        swept = 0
        try:
            for directory, _, names in os.walk(self._root, onerror=_unlisted):
                for name in names:
                    path = Path(directory, name)
                    with suppress(FileNotFoundError):
                        if PARTIAL_NAME.search(name) and path.stat().st_mtime < before:
                            path.unlink()
                            swept += 1
        except OSError as error:
            raise _file_kind(error) from error
        return swept


def _unlisted(error: OSError) -> None:
    """What cannot be listed must not look empty: the collector decides by listings."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_kind(error: OSError) -> Exception:
    # A failed flush is not asked again as though it had not happened: the file was removed, the push ends here.
    reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullError(reason)
    return PassingError(reason) if error.errno in (errno.EAGAIN, errno.EINTR) else RefusedError(reason)
