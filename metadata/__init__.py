"""The dm-thin metadata format and its algorithms: the public names of the package."""

from .capture import OverlayStore, capture_space_maps, snapshot_as_pool
from .checksum import BlockKind
from .commit import CommitReport, PreparedCommit
from .devices import DeviceRecord
from .difference import ABSENT, Difference, differences
from .dump import dump
from .errors import (
    AlreadyFormatted,
    BlockDamaged,
    ClockExhausted,
    CommitPending,
    CountDamaged,
    Damage,
    DeviceExists,
    DeviceIncomplete,
    MetadataError,
    MetadataFull,
    MetadataSnapshotExists,
    MetadataTooShort,
    NoMetadataSnapshot,
    NoSuchDevice,
    NotPoolMetadata,
    OutOfRange,
    ReadOnlyMetadata,
    RestoreInvalid,
    ShortRead,
    SuperblockLost,
    UnsupportedPool,
    XmlInvalid,
)
from .format import format_pool
from .layout import BLOCK_BYTES, METADATA_BLOCKS_MAX, pack_mapping, unpack_mapping
from .mend import clear_needs_check, mend, mendable
from .pool_build import BuildReport
from .pool_metadata import LeafView, PoolMetadata, Usage
from .problems import Affected, Fault, Place, Problem, Severity
from .recount import Extent, recount
from .repair import DeviceOutcome, Known, Outcome, RepairReport, repair
from .restore import Instead, restore
from .store import BlockStore, FileStore, MemoryStore
from .superblock import Superblock

__all__ = [
    "ABSENT",
    "BLOCK_BYTES",
    "METADATA_BLOCKS_MAX",
    "Affected",
    "AlreadyFormatted",
    "BlockDamaged",
    "BlockKind",
    "BlockStore",
    "BuildReport",
    "ClockExhausted",
    "CommitPending",
    "CommitReport",
    "CountDamaged",
    "Damage",
    "DeviceExists",
    "DeviceIncomplete",
    "DeviceOutcome",
    "DeviceRecord",
    "Difference",
    "Extent",
    "Fault",
    "FileStore",
    "Instead",
    "Known",
    "LeafView",
    "MemoryStore",
    "MetadataError",
    "MetadataFull",
    "MetadataSnapshotExists",
    "MetadataTooShort",
    "NoMetadataSnapshot",
    "NoSuchDevice",
    "NotPoolMetadata",
    "OutOfRange",
    "Outcome",
    "OverlayStore",
    "Place",
    "PoolMetadata",
    "PreparedCommit",
    "Problem",
    "ReadOnlyMetadata",
    "RepairReport",
    "RestoreInvalid",
    "Severity",
    "ShortRead",
    "Superblock",
    "SuperblockLost",
    "UnsupportedPool",
    "Usage",
    "XmlInvalid",
    "capture_space_maps",
    "clear_needs_check",
    "differences",
    "dump",
    "format_pool",
    "mend",
    "mendable",
    "pack_mapping",
    "recount",
    "repair",
    "restore",
    "snapshot_as_pool",
    "unpack_mapping",
]
