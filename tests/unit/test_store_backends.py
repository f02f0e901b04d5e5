"""The services behind a store: what their answers are taken for, and which files a directory calls its own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from thinpool.store import backends
from thinpool.store.backends import DirectoryBackend, ObstoreBackend
from thinpool.store.objects import PassingError

pytest.importorskip("obstore", reason="needs the package obstore")

ADDRESS = "http://127.0.0.1:4160/b/packs/41/416abc"


def error_of(text: str) -> Exception:
    """As obstore words it: the sentence, then what is for programmers."""
    return RuntimeError(
        f"Generic S3 error: Error performing GET {ADDRESS} in 1.416ms - {text}\n\nretries: 0, 416"
    )


@pytest.mark.parametrize(
    "text",
    ["HTTP error: error sending request", "Server returned non-2xx status code: 503 Service Unavailable: "],
)
@pytest.mark.parametrize("length_bytes", [10, None])
def test_digits_of_an_address_are_not_taken_for_a_status(
    monkeypatch: pytest.MonkeyPatch, text: str, length_bytes: int | None
) -> None:
    """A server that is away for a moment must be asked again, not its packs called damaged."""

    def fail(*_arguments: object, **_named: object) -> None:
        raise error_of(text)

    monkeypatch.setattr("obstore.get", fail)
    monkeypatch.setattr("obstore.get_range", fail)
    with pytest.raises(PassingError):
        ObstoreBackend(None).get("packs/41/416abc", 0, length_bytes)  # type: ignore[arg-type]


def test_a_range_behind_the_end_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise error_of("Server returned non-2xx status code: 416 Range Not Satisfiable: <Error>")

    memory = backends.open_objects(f"memory://{secrets.token_hex(8)}")
    memory.put("key", b"abc")
    assert memory._backend.get("key", 3, 5) == b""
    monkeypatch.setattr("obstore.get_range", fail)
    assert ObstoreBackend(None).get("key", 3, 5) == b""  # type: ignore[arg-type]


def test_only_unfinished_files_of_a_store_are_swept(tmp_path: Path) -> None:
    """The directory of a store may hold files of other people."""
    ours = tmp_path / "packs" / f"abc.{'0f' * 8}.partial"
    ours.parent.mkdir()
    others = [tmp_path / "film.mkv.partial", tmp_path / f"{'0f' * 8}.partial", tmp_path / "x.12ab.partial"]
    for path in (ours, *others):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    assert DirectoryBackend(tmp_path).sweep(100.0) == 1
    assert not ours.exists()
    assert all(path.exists() for path in others)
