"""The last commit of a pool whose superblock, or both of whose lists of devices, cannot be used as they are.

In: choosing among the states that storage holds. Out: finding and comparing them (commit_candidate, commit_order),
making a pool of the one chosen (repair).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .commit_candidate import Candidates, CommitCandidate
from .commit_clues import CommitClues
from .commit_order import CommitOrder
from .layout import SUPERBLOCK_LOCATION, SUPERBLOCK_MAGIC, SUPERBLOCK_VERSION
from .node_batch import read_nodes
from .store import BlockStore
from .superblock import SpaceMapRoot, Superblock
from .walk import listed_roots, salvage


@dataclass(frozen=True, slots=True)
class LastCommit:
    """What was chosen.

    Attributes:
        store: the store, with blocks that were written to wrong places where they belong.
        state: None where there is nothing to choose from.
        base: a superblock to take sizes from: the state's own, otherwise that of a metadata snapshot.
        whole: other states that are whole, the latest first.
        proven: the format itself says that none of those is later.
        held: where the copy of the superblock is that a metadata snapshot keeps, 0 where there is none.
    """

    store: BlockStore
    state: CommitCandidate | None
    base: Superblock | None
    whole: tuple[CommitCandidate, ...] = ()
    proven: bool = False
    held: int = 0


def find_last_commit(source: BlockStore) -> LastCommit:
    """Without a superblock: the state that is later than all others. Never raises for what blocks hold."""
    clues = CommitClues(source)
    found = Candidates(clues)
    order = CommitOrder(clues, found.trees)
    ordered = order.newest_first(found.states)
    if not ordered:
        return LastCommit(clues.store, None, clues.superblocks[0] if clues.superblocks else None)
    state, *others = ordered
    copies = ([] if state.superblock is None else [state.superblock]) + clues.superblocks
    whole = tuple(other for other in others if other.whole)
    proven = all(order.proven(state, other) for other in whole)
    held = 0 if state.counts is None else clues.held_copy(state.counts)
    return LastCommit(clues.store, state, copies[0] if copies else None, whole, proven, held)


def doubt_superblock(source: BlockStore, superblock: Superblock) -> LastCommit | None:
    """With a superblock that can be read: what to go by instead of its lists, None where they will do.

    They will not do where both are damaged, or where they were overwritten by a later commit that is whole: the
    superblock itself is then an old one.
    """
    ids, roots, all_roots = listed_roots(source, superblock.mapping_root)
    record_ids, _, all_records = salvage(source, 24, superblock.details_root)
    agree = all_roots and all_records and ids.tolist() == record_ids.tolist()
    if agree and not read_nodes(source, roots, 8).damaged:
        return None
    clues = CommitClues(source)
    found = Candidates(clues)
    order = CommitOrder(clues, found.trees)
    own = next((state for state in found.every if state.superblock == superblock), None)
    others = [state for state in order.newest_first(found.states) if state is not own]
    proof = [state for state in others if state.whole and own is not None and order.overwrote(state, own)]
    if own is None:
        return None
    if others and (proof or not (own.devices() or own.records)):
        whole = tuple(state for state in others[1:] if state.whole)
        proven = all(order.proven(others[0], each) for each in whole)
        return LastCommit(clues.store, others[0], others[0].superblock or superblock, whole, proven)
    roots_hold = all_roots and own.roots is not None and not own.named
    records_hold = (
        all_records and own.records is not None and own.devices().keys() <= set(own.records.keys.tolist())
    )
    return None if roots_hold or records_hold else LastCommit(clues.store, own, superblock)


def superblock_of(found: LastCommit, data_block_sectors: int) -> Superblock:
    """A superblock around a state; block numbers of lost lists are outside of the store."""
    nothing = SpaceMapRoot(0, 0, 0, 0)
    nowhere = found.store.size_blocks()
    base, state = found.base, found.state
    if base is None:
        fields = (0, 0, bytes(16), SUPERBLOCK_MAGIC, SUPERBLOCK_VERSION, 0, 0, 0)
        base = Superblock(*fields, nothing, nothing, 0, 0, data_block_sectors, 0, 0, 0, 0, 0)
    own = state is not None and state.superblock is not None and state.superblock == base
    roots = None if state is None else state.doubted if state.named else state.roots
    records = None if state is None else state.records
    mapping_root = roots.root if roots is not None else base.mapping_root if own else nowhere
    details_root = records.root if records is not None else base.details_root if own else nowhere
    space = nothing if state is None or state.space is None else state.space
    return replace(
        base,
        location=SUPERBLOCK_LOCATION,
        time=max(base.time, 0 if state is None else state.time),
        transaction_id=max(base.transaction_id, 0 if state is None else state.transaction_id),
        held_root=base.held_root if own else found.held,
        data_space=base.data_space if own else nothing,
        metadata_space=space,
        mapping_root=mapping_root,
        details_root=details_root,
    )
