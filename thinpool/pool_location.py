"""Where the parts of a pool are: a pool directory, or two bare paths.

In: paths, and whether they look like a pool at all. Out: opening anything (`opening.py`, `pool_lock.py`).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import NotAPool, PoolNotFound


@dataclass(frozen=True, slots=True)
class PoolLocation:
    """A pool by its paths. Make one with `directory` or `bare`.

    `root` is the pool directory, None for a bare pool (LVM's `_tmeta` and `_tdata`, or two plain files), which has
    no catalogue, no lock file and no sockets of its own. `names_path` may tell the names of a bare pool's devices.
    """

    metadata_path: Path
    data_path: Path
    root: Path | None
    names_path: Path | None = None

    @classmethod
    def directory(cls, path: Path) -> PoolLocation:
        """A pool directory, whether it exists or not."""
        return cls(path / "metadata", path / "data", path)

    @classmethod
    def bare(cls, metadata: Path, data: Path, names: Path | None = None) -> PoolLocation:
        """A pool of two files or block devices, and a file that names its devices (`lvm_names.py`)."""
        return cls(metadata, data, None, names)

    @classmethod
    def metadata_alone(cls, path: Path, names: Path | None = None) -> PoolLocation:
        """A metadata file or device by itself: enough to check, dump and repair it, not to open the pool."""
        return cls(path, Path(os.devnull), None, names)

    def __str__(self) -> str:
        if self.root is not None:
            return str(self.root)
        return str(self.metadata_path) if self.metadata_only else f"{self.metadata_path}+{self.data_path}"

    @property
    def metadata_only(self) -> bool:
        """Whether only the mappings are there to look at: `--metadata` without `--data`."""
        return self.root is None and self.data_path == Path(os.devnull)

    @property
    def has_catalog(self) -> bool:
        """Whether names are kept beside the metadata."""
        return self.root is not None

    @property
    def catalog_path(self) -> Path | None:
        """The SQLite file of names."""
        return None if self.root is None else self.root / "catalog"

    @property
    def lock_path(self) -> Path | None:
        """The file whose flock says who has the pool open."""
        return None if self.root is None else self.root / "lock"

    @property
    def journal_path(self) -> Path | None:
        """What was answered and not committed, for when the server is killed (`mapping_journal.py`)."""
        return None if self.root is None else self.root / "journal"

    @property
    def control_path(self) -> Path | None:
        """The socket of the control API, there while the pool is served."""
        return None if self.root is None else self.root / "control"

    @property
    def nbd_socket_path(self) -> Path | None:
        """Where `serve` listens unless told otherwise."""
        return None if self.root is None else self.root / "nbd.sock"

    @property
    def attachments_path(self) -> Path | None:
        """The directory of records that `attach` leaves for `detach`."""
        return None if self.root is None else self.root / "attachments"

    def absolute(self) -> PoolLocation:
        """The same place, whatever the working directory becomes."""
        root = None if self.root is None else self.root.absolute()
        names = None if self.names_path is None else self.names_path.absolute()
        return PoolLocation(self.metadata_path.absolute(), self.data_path.absolute(), root, names)

    def require(self) -> None:
        """Raise PoolNotFound where nothing is, NotAPool where something else is. Reads no content."""
        if self.root is not None:
            try:
                mode = self.root.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                raise PoolNotFound(str(self.root)) from None
            if not stat.S_ISDIR(mode):
                raise NotAPool(str(self.root), "it is not a directory")
        try:
            mode = self.metadata_path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if self.root is None:
                raise PoolNotFound(str(self.metadata_path)) from None
            raise NotAPool(str(self.root), "it holds no file called metadata") from None
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise NotAPool(str(self.metadata_path), "it is neither a file nor a block device")
