"""What check and repair make of a damaged image, judged by a reader that shares nothing with them.

In: does the damage change what the pool means, did check say so, which devices had to come back, did they. Out: tables.
"""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from metadata import Known, MemoryStore, MetadataError, PoolMetadata, recount, repair
from tests.fakes.metadata_audit import audit

from .damages import Damaged, damage
from .specimen import BLOCK_BYTES, DATA_BLOCK_SECTORS, DATA_BLOCKS, METADATA_BLOCKS, Contents, Specimen

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
TOOL_SECONDS = 120


@dataclass(frozen=True)
class Verdict:
    """One case. `meaning`: "same", "changed", or "consistent": changed into another pool with nothing wrong in it.

    `undamaged`: devices none of whose nodes changed. `returned`, `debian_returned`: those of them that repair gave back
    complete. `debian_found` and the like are None where Debian's tools were not asked.
    """

    seed: int
    kinds: tuple[str, ...]
    resealed: bool
    meaning: str
    found: bool
    undamaged: frozenset[int]
    returned: frozenset[int]
    source_kept: bool
    honest: bool
    superblock_hit: bool
    lists_hit: bool
    debian_found: bool | None = None
    debian_returned: frozenset[int] | None = None
    debian_kept: bool | None = None


def judge(specimen: Specimen, seed: int, work: Path | None = None) -> Verdict:
    """Damage, check, repair, compare; with `work` for files, ask Debian's tools as well."""
    damaged = damage(specimen, seed)
    image = bytes(damaged.image)
    digest = hashlib.sha256(image).digest()
    source = MemoryStore(image)
    found = bool(recount(source))
    undamaged = frozenset(device for device, nodes in specimen.nodes.items() if not nodes & damaged.blocks)
    target = MemoryStore(METADATA_BLOCKS)
    known = Known(DATA_BLOCK_SECTORS, DATA_BLOCKS, specimen.transaction_id)
    report = repair(source, target, known)
    after = contents(target)
    returned = frozenset(device for device in undamaged if after.get(device) == specimen.contents[device])
    # Honest: what is said to be complete is what it was, unless the damage made a consistent other pool of it.
    meaning = meaning_of(specimen, damaged)
    claims = {each.device for each in report.devices if each.outcome.name in ("WHOLE", "FOUND")}
    honest = meaning == "consistent" or all(
        after.get(device) == specimen.contents.get(device) for device in claims
    )
    kept = hashlib.sha256(source.image).digest() == digest and not recount(target)
    lists = (specimen.used["list of roots"], specimen.used["records"])
    hit = 0 in damaged.blocks, all(damaged.blocks.intersection(blocks) for blocks in lists)
    own = (
        seed,
        tuple(damaged.kinds),
        damaged.resealed,
        meaning,
        found,
        undamaged,
        returned,
        kept,
        honest,
        *hit,
    )
    return Verdict(*own) if work is None else Verdict(*own, *_debian(specimen, image, undamaged, work))


def contents(store: MemoryStore) -> Contents:
    """Mappings by device, as far as a pool opens."""
    try:
        pool = PoolMetadata.open(store, writable=False)
        found: Contents = {}
        for record in pool.devices():
            mappings: dict[int, int] = {}
            for keys, values in pool.mappings(record.device_id):
                mappings.update(zip(keys.tolist(), values.tolist(), strict=True))
            found[record.device_id] = mappings
    except (MetadataError, OSError):
        return {}
    return found


def meaning_of(specimen: Specimen, damaged: Damaged) -> str:
    """By a full naive audit: what it objects to has changed, what it accepts may be another pool or the same."""
    before = audit(specimen.image)
    try:
        after = audit(bytes(damaged.image))
    except Exception:
        return "changed"
    fields = ("time", "transaction_id", "data_block_sectors", "flags")
    same = after.mappings == before.mappings and after.devices == before.devices
    same = same and all(
        getattr(after.superblock, name) == getattr(before.superblock, name) for name in fields
    )
    return "same" if same else "consistent"


def _debian(
    specimen: Specimen, image: bytes, undamaged: frozenset[int], work: Path
) -> tuple[bool, frozenset[int], bool]:
    source, target = work / "damaged", work / "repaired"
    source.write_bytes(image)
    target.write_bytes(bytes(METADATA_BLOCKS * BLOCK_BYTES))
    found = _run("thin_check", str(source)) != 0
    options = [f"--data-block-size={DATA_BLOCK_SECTORS}", f"--nr-data-blocks={DATA_BLOCKS}"]
    options.append(f"--transaction-id={specimen.transaction_id}")
    ended = _run("thin_repair", "-i", str(source), "-o", str(target), *options)
    after = contents(MemoryStore(target.read_bytes())) if ended == 0 else {}
    returned = frozenset(device for device in undamaged if after.get(device) == specimen.contents[device])
    return found, returned, source.read_bytes() == image


def _run(*command: str) -> int:
    done = subprocess.run(
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TOOL_SECONDS,
        check=False,
    )
    return done.returncode
