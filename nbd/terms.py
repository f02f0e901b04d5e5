"""What a finished handshake leaves behind: the terms under which a connection transmits."""

from dataclasses import dataclass

from .constants import TransmissionFlag
from .device import Export, Session


@dataclass(frozen=True, slots=True)
class SelectedContext:
    """One meta context of SET_META_CONTEXT; ids are unique within the connection."""

    context_id: int
    name: str


@dataclass(frozen=True, slots=True)
class Terms:
    """The export as promised to this client; later changes of the export do not alter it."""

    export: Export
    session: Session
    size_bytes: int
    flags: TransmissionFlag
    structured: bool = False
    extended: bool = False
    contexts: tuple[SelectedContext, ...] = ()
    payload_bytes_max: int = 64 * 1024 * 1024
    read_bytes_max: int = 64 * 1024 * 1024

    @property
    def chunked(self) -> bool:
        """Whether reads are answered in chunks."""
        return self.structured or self.extended

    @property
    def read_only(self) -> bool:
        """Whether modifying commands are refused."""
        return bool(self.flags & TransmissionFlag.READ_ONLY)
