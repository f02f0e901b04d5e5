"""The recount finds each thing that can be wrong with a pool, says where, and nothing else; whatever the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from metadata import (
    Affected,
    Fault,
    MemoryStore,
    PoolMetadata,
    Severity,
    Superblock,
    dump,
    format_pool,
    recount,
)
from metadata.bitmap import Bitmap, decode_bitmap
from metadata.checksum import seal, sniff
from metadata.layout import BLOCK_BYTES
from metadata.node import make_internal
from tests.fakes.metadata_edits import Image

MAPPED = 3000


def mappings(first: int, count: int, data: int, time: int = 0) -> tuple[np.ndarray, np.ndarray]:
    keys = np.arange(first, first + count, dtype=np.uint64)
    values = (keys - np.uint64(first) + np.uint64(data)) << np.uint64(24) | np.uint64(time)
    return keys, values


def make_pool() -> bytes:
    """Device 1 with 3000 mappings in a tree of two levels; 2 and 3 are snapshots of it, 3 changed; 4 empty; one held.

    Data blocks 100.. are named by three leaves after two snapshots were changed in the same place.
    """
    store = MemoryStore(600)
    format_pool(store, data_block_sectors=128, data_blocks=20_000)
    pool = PoolMetadata.open(store)
    pool.create_device(1)
    pool.insert(1, *mappings(0, MAPPED, 0))
    pool.commit()
    pool.create_snapshot(2, 1)
    pool.create_snapshot(3, 1)
    pool.create_device(4)
    pool.insert(3, *mappings(100, 5, 5000, 2))
    pool.insert(2, *mappings(110, 5, 5010, 2))
    pool.commit()
    pool.reserve_metadata_snapshot()
    pool.commit()
    pool.insert(1, *mappings(5000, 7, 6000, 2))
    pool.create_device(9)
    pool.commit()
    assert recount(store) == []
    return bytes(store.image)


POOL = make_pool()


@pytest.fixture
def image() -> Image:
    return Image(POOL)


def faults(store: MemoryStore) -> dict[Fault, list]:
    found: dict[Fault, list] = {}
    for problem in recount(store):
        assert str(problem).startswith(problem.severity.name.lower())
        found.setdefault(problem.fault, []).append(problem)
    return found


def only(store: MemoryStore, fault: Fault, severity: Severity):
    """The single problem there is."""
    found = recount(store)
    assert [(problem.fault, problem.severity) for problem in found] == [(fault, severity)], list(
        map(str, found)
    )
    return found[0]


# Counts


def leak(image: Image, space: str) -> int:
    block = image.free_block(space)
    image.set_count(space, block, 1)
    name = {"data_space": image.superblock.data_space, "metadata_space": image.superblock.metadata_space}[
        space
    ]
    image.set_space(space, allocated=name.allocated + 1)
    record = image.record(space, block // 16320)
    image.set_record(space, block // 16320, "free", int(record["free"]) - 1)
    return block


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
def test_leaked_block(image: Image, space: str):
    block = leak(image, space)
    problem = only(image, Fault.COUNT_LEAK, Severity.LEAK)
    assert (problem.first, problem.count, problem.expected, problem.found) == (block, 1, 0, 1)


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
@pytest.mark.parametrize("step", [1, -1])
def test_count_too_high_or_too_low(image: Image, space: str, step: int):
    # Blocks counted once and twice: a data block of the unshared leaf; a leaf shared by three trees' parents.
    block = 1500 if space == "data_space" else image.leaves(image.root_of(1))[5]
    count = image.count(space, block)
    assert count == (1 if space == "data_space" else 3)
    if space == "metadata_space":
        overflow = image.superblock.metadata_space.overflow_root
        node = image.node(overflow)
        place = node.keys.tolist().index(block)
        uses = int(node.values[place])
        image.edit_values(overflow, lambda values: values.__setitem__(place, uses + step))
        expected_found = (uses, uses + step)
    else:
        if step < 0:
            image.set_count(space, 1500, 0)
            image.set_space(space, allocated=image.superblock.data_space.allocated - 1)
            image.set_record(space, 0, "free", int(image.record(space, 0)["free"]) + 1)
            image.set_record(space, 0, "none_free_before", 0)
        else:
            image.set_count(space, 1500, 2)
        expected_found = (1, 1 + step)
    fault, severity = (Fault.COUNT_HIGH, Severity.LEAK) if step > 0 else (Fault.COUNT_LOW, Severity.ERROR)
    problem = only(image, fault, severity)
    assert (problem.first, problem.count) == (block, 1)
    assert (problem.expected, problem.found) == expected_found


def test_neighbouring_blocks_with_the_same_figures_are_one_problem(image: Image):
    for block in range(1000, 1040):
        image.set_count("data_space", block, 2)
    problem = only(image, Fault.COUNT_HIGH, Severity.LEAK)
    assert (problem.first, problem.count, problem.expected, problem.found) == (1000, 40, 1, 2)


def test_exact_count_missing(image: Image):
    image.set_count("data_space", 1500, 3)
    problem = only(image, Fault.NO_OVERFLOW, Severity.ERROR)
    assert problem.first == 1500


def test_exact_count_not_needed(image: Image):
    overflow = image.superblock.data_space.overflow_root
    node = image.node(overflow)
    image.set_node(overflow, np.append(node.keys, np.uint64(19_000)), np.append(node.values, np.uint32(3)))
    problem = only(image, Fault.EXTRA_OVERFLOW, Severity.HINT)
    assert problem.first == 19_000


# Redundant figures


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
def test_blocks_in_use(image: Image, space: str):
    allocated = (
        image.superblock.data_space if space == "data_space" else image.superblock.metadata_space
    ).allocated
    image.set_space(space, allocated=allocated + 3)
    problem = only(image, Fault.ALLOCATED, Severity.HINT)
    assert (problem.expected, problem.found) == (allocated, allocated + 3)


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
def test_free_blocks_of_a_bitmap(image: Image, space: str):
    free = int(image.record(space, 0)["free"])
    image.set_record(space, 0, "free", free - 1)
    problem = only(image, Fault.FREE_BLOCKS, Severity.HINT)
    assert (problem.expected, problem.found) == (free, free - 1)


def test_free_blocks_of_the_last_bitmap_may_count_existing_blocks_only(image: Image):
    free = int(image.record("data_space", 1)["free"])
    image.set_record("data_space", 1, "free", free - (2 * 16320 - 20_000))
    assert recount(image) == []


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
def test_place_of_the_first_free_block(image: Image, space: str):
    exact = int(image.record(space, 0)["none_free_before"])
    image.set_record(space, 0, "none_free_before", 0)
    assert recount(image) == []
    image.set_record(space, 0, "none_free_before", exact + 1)
    problem = only(image, Fault.FIRST_FREE, Severity.HINT)
    assert problem.found == exact + 1


def test_mapped_blocks(image: Image):
    details = image.superblock.details_root
    image.edit_values(details, lambda values: values["mapped_blocks"].__setitem__(0, 17))
    # The records are shared with the metadata snapshot no more: it has its own, right ones.
    problem = only(image, Fault.MAPPED_BLOCKS, Severity.HINT)
    assert (problem.expected, problem.found) == (MAPPED + 7, 17)
    assert problem.affects == (Affected(1, 0, 2**64),)


def test_impossible_times_of_a_record(image: Image):
    image.edit_values(
        image.superblock.details_root, lambda values: values["snapshotted_time"].__setitem__(1, 99)
    )
    assert only(image, Fault.RECORD_TIME, Severity.HINT).affects[0].device == 2


def test_used_blocks_past_the_end(image: Image):
    location, _ = image.bitmap_of("data_space", 16320)
    assert location
    image.set_count("data_space", 20_005, 1)
    image.set_record("data_space", 1, "free", int(image.record("data_space", 1)["free"]) - 1)
    only(image, Fault.TAIL, Severity.LEAK)


# Mappings


def first_private_leaf(image: Image, device: int) -> int:
    """A leaf that only this device's live tree reaches: its last one, after the metadata snapshot was taken."""
    return image.leaves(image.root_of(device))[-1]


def test_mapping_past_the_data_device(image: Image):
    leaf = first_private_leaf(image, 1)
    count = len(image.node(leaf).keys)
    image.edit_values(leaf, lambda values: values.__setitem__(count - 1, 20_000 << 24))
    found = faults(image)
    assert set(found) == {Fault.DATA_OUTSIDE, Fault.COUNT_LEAK}
    problem = found[Fault.DATA_OUTSIDE][0]
    assert problem.severity is Severity.ERROR
    assert problem.affects == (Affected(1, 5006, 5007),)
    assert problem.place.path[-1] == leaf
    assert problem.place.path[0] == image.superblock.mapping_root


def test_mapping_of_a_later_time(image: Image):
    leaf = first_private_leaf(image, 1)
    image.edit_values(leaf, lambda values: values.__setitem__(-1, int(values[-1]) + 1))
    assert only(image, Fault.FUTURE_TIME, Severity.ERROR).affects == (Affected(1, 5006, 5007),)


def test_device_without_record(image: Image):
    details = image.superblock.details_root
    node = image.node(details)
    image.set_node(details, node.keys[:-1], node.values[:-1])
    assert only(image, Fault.NO_RECORD, Severity.ERROR).affects == (Affected(9, 0, 2**64),)


def test_device_without_mappings_tree(image: Image):
    details = image.superblock.details_root
    node = image.node(details)
    image.set_node(details, np.append(node.keys, np.uint64(77)), np.append(node.values, node.values[3]))
    assert only(image, Fault.NO_TREE, Severity.ERROR).affects == (Affected(77, 0, 2**64),)


def test_impossible_device_id(image: Image):
    top = image.superblock.mapping_root
    node = image.node(top)
    image.set_node(top, [*node.keys.tolist()[:-1], 2**24])
    assert set(faults(image)) == {Fault.DEVICE_ID, Fault.NO_RECORD, Fault.NO_TREE}


# Nodes


@pytest.mark.parametrize(("entries", "wrong"), [(84, False), (83, True)])
def test_underfull_leaf(image: Image, entries: int, wrong: bool):
    leaf = image.leaves(image.root_of(1))[5]
    node = image.node(leaf)
    image.set_node(leaf, node.keys[:entries], node.values[:entries])
    found = faults(image)
    assert (Fault.UNDERFULL in found) == wrong
    # Its mappings are gone from every device and from the metadata snapshot.
    assert len(found[Fault.MAPPED_BLOCKS]) == 6
    if wrong:
        affected = {(one.device, one.held) for one in found[Fault.UNDERFULL][0].affects}
        assert affected == {(device, held) for device in (1, 2, 3) for held in (False, True)}


@pytest.mark.parametrize(("key", "fault"), [(1, Fault.BELOW_RANGE), (-1, None), (-300, Fault.ABOVE_RANGE)])
def test_parent_key(image: Image, key: int, fault: Fault | None):
    """Too large is an error, a little too small is allowed, so small that the left neighbour overlaps is not."""
    root = image.root_of(1)
    node = image.node(root)
    keys = node.keys.tolist()
    if key == -1:
        # Make room: the left neighbour loses its last entry.
        left = int(node.values[2])
        entries = image.node(left)
        image.set_node(left, entries.keys[:-1], entries.values[:-1])
    if key == -300:
        keys[4] = keys[3] + 1
    else:
        keys[3] += key
    image.set_node(root, keys)
    found = faults(image)
    assert {Fault.BELOW_RANGE, Fault.ABOVE_RANGE} & set(found) == ({fault} if fault else set())
    if fault:
        affected = {(one.device, one.held) for one in found[fault][0].affects}
        assert affected == {(1, False)}


def test_child_named_twice(image: Image):
    root = image.root_of(1)
    values = image.node(root).values.copy()
    values[4] = values[5]
    image.set_node(root, values=values)
    assert {Fault.BELOW_RANGE, Fault.ABOVE_RANGE} & set(faults(image))


def test_leaves_at_different_depths(image: Image):
    root = image.root_of(1)
    values = image.node(root).values.copy()
    values[4] = image.root_of(2)
    image.set_node(root, values=values)
    assert Fault.UNEVEN in faults(image)


def test_node_that_is_its_own_ancestor(image: Image):
    root = image.root_of(1)
    values = image.node(root).values.copy()
    values[4] = root
    image.set_node(root, values=values)
    assert Fault.LOOP in faults(image)


def test_node_outside_the_metadata(image: Image):
    image.edit_values(image.root_of(1), lambda values: values.__setitem__(4, 600))
    found = faults(image)
    keys = image.node(image.root_of(1)).keys
    assert found[Fault.OUTSIDE][0].affects == (Affected(1, int(keys[4]), int(keys[5])),)


def test_node_of_another_tree(image: Image):
    image.edit_values(
        image.superblock.mapping_root, lambda values: values.__setitem__(3, image.superblock.details_root)
    )
    assert {Fault.CROSS_LINKED, Fault.UNREADABLE} & set(faults(image))


def test_damaged_shared_leaf_names_every_device_that_reaches_it(image: Image):
    leaf = image.leaves(image.root_of(1))[5]
    image.image[leaf * BLOCK_BYTES + 100] ^= 1
    found = faults(image)
    problem = found[Fault.UNREADABLE][0]
    assert "checksum" in problem.detail
    assert problem.first == leaf
    keys = image.node(image.root_of(1)).keys
    span = (int(keys[5]), int(keys[6]))
    assert {(one.device, one.begin, one.end, one.held) for one in problem.affects} == {
        (device, *span, held) for device in (1, 2, 3) for held in (False, True)
    }
    # What only the damaged leaf may have named is not called a leak.
    assert set(found) == {Fault.UNREADABLE, Fault.UNVERIFIED}


def test_keys_out_of_order(image: Image):
    leaf = first_private_leaf(image, 1)
    keys = image.node(leaf).keys.tolist()
    keys[3], keys[4] = keys[4], keys[3]
    image.set_node(leaf, keys)
    assert "ascending" in faults(image)[Fault.UNREADABLE][0].detail


# Superblock and storage


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 1},
        {"incompat_flags": 1},
        {"compat_ro_flags": 4},
        {"data_block_sectors": 100},
        {"data_block_sectors": 0},
        {"metadata_block_sectors": 16},
    ],
)
def test_impossible_fields(image: Image, fields: dict[str, int]):
    image.set_superblock(**fields)
    assert next(iter(fields)) in only(image, Fault.FIELD, Severity.ERROR).detail


def test_no_superblock(image: Image):
    image.put(0, bytes(BLOCK_BYTES))
    assert only(image, Fault.SUPERBLOCK, Severity.ERROR)
    assert only(MemoryStore(0), Fault.SUPERBLOCK, Severity.ERROR)


def test_metadata_snapshot_gone(image: Image):
    image.put(image.superblock.held_root, bytes(BLOCK_BYTES))
    assert Fault.HELD in faults(image)


def test_larger_storage_is_fine_and_smaller_is_not(image: Image):
    image.resize(700)
    assert recount(image) == []
    image.resize(590)
    assert Fault.FIELD in faults(image)


@pytest.mark.parametrize("field", ["bitmap_root", "overflow_root"])
@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
@pytest.mark.parametrize("value", [0, 599, 2**63, 2**64 - 1])
def test_garbled_space_map_roots(image: Image, space: str, field: str, value: int):
    image.set_space(space, **{field: value})
    assert any(problem.severity is Severity.ERROR for problem in recount(image))


@pytest.mark.parametrize("space", ["data_space", "metadata_space"])
@pytest.mark.parametrize("value", [0, 1, 10**9, 2**63, 2**64 - 1])
def test_garbled_sizes(image: Image, space: str, value: int):
    image.set_space(space, blocks=value)
    assert any(problem.severity is Severity.ERROR for problem in recount(image))


class Flaky(MemoryStore):
    """Some blocks cannot be read, as on a failing disk."""

    def __init__(self, image: bytes, bad: set[int]) -> None:
        super().__init__(image)
        self.bad = bad

    def read(self, first: int, count: int) -> bytes:
        if self.bad & set(range(first, first + count)):
            raise OSError(5, "Input/output error")
        return super().read(first, count)


def test_blocks_that_cannot_be_read():
    for bad in range(600):
        found = recount(Flaky(POOL, {bad}))
        in_use = Image(POOL).count("metadata_space", bad) > 0
        assert bool(found) == in_use, (bad, list(map(str, found)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block, random: bytes(BLOCK_BYTES),
        lambda block, random: random.bytes(BLOCK_BYTES),
        lambda block, random: block[:512] + bytes(BLOCK_BYTES - 512),
    ],
)
def test_any_block_in_use_that_is_spoilt_is_noticed(spoil: Callable):
    random = np.random.default_rng(1)
    clean = Image(POOL)
    for location in range(600):
        image = Image(POOL)
        image.put(location, spoil(image.block(location), random))
        changed = image.image != clean.image
        assert bool(recount(image)) == (changed and clean.count("metadata_space", location) > 0), location


def test_garbage_with_good_checksums_raises_nothing():
    """Random numbers in the header, keys and values of nodes, checksum right: found or not, never an exception."""
    random = np.random.default_rng(2)
    for _ in range(400):
        image = Image(POOL)
        for _ in range(3):
            location = int(random.integers(0, 120))
            kind = sniff(image.block(location))
            if kind is None:
                continue
            block = bytearray(image.block(location))
            for _ in range(int(random.integers(1, 5))):
                at = int(random.integers(2, 60)) * 4 if random.integers(2) else int(random.integers(4, 4092))
                block[at : at + 4] = int(random.choice([0, 1, 2, 255, 2**31, 2**32 - 1])).to_bytes(
                    4, "little"
                )
            image.put(location, seal(block, kind, location))
        recount(image)


# Rare shapes


def free_places(image: Image, count: int) -> list[int]:
    """Unused metadata blocks to put nodes into."""
    return [block for block in range(599, 0, -1) if image.count("metadata_space", block) == 0][:count]


def test_path_deeper_than_any_tree(image: Image):
    leaf = image.leaves(image.root_of(1))[0]
    below = leaf
    for place in free_places(image, 20):
        image.put(place, make_internal(np.array([0], np.uint64), np.array([below], np.uint64)).encode(place))
        below = place
    image.edit_values(image.root_of(1), lambda values: values.__setitem__(0, below))
    assert Fault.TOO_DEEP in faults(image)


def test_node_on_two_levels(image: Image):
    """An inner node and, below it, the leaf that stands beside it."""
    root = image.root_of(1)
    node = image.node(root)
    place = free_places(image, 1)[0]
    inner = make_internal(node.keys[:1], node.values[1:2])
    image.put(place, inner.encode(place))
    image.edit_values(root, lambda values: values.__setitem__(0, place))
    assert Fault.UNEVEN in faults(image)


def test_smaller_capacity_is_read_and_dumped(image: Image):
    """The format lets a node say that it has room for less than it could; thin_check takes that too."""
    for leaf in image.leaves(image.root_of(1)):
        node = image.node(leaf)
        if len(node.keys) <= 249:
            image.set_node(leaf, capacity=249)
    assert recount(image) == []
    written: list[str] = []
    dump(image, written.append)
    expected: list[str] = []
    dump(MemoryStore(POOL), expected.append)
    assert written == expected


def test_metadata_snapshot_that_holds_another(image: Image):
    held = image.superblock.held_root
    copy = Superblock.unpack(image.block(held), held)
    image.put(held, replace(copy, held_root=5).pack())
    assert only(image, Fault.HELD, Severity.ERROR).first == held


@pytest.mark.parametrize("held", [1, 600, 2**64 - 1])
def test_metadata_snapshot_in_a_wrong_place(image: Image, held: int):
    image.set_superblock(held_root=held)
    assert {Fault.CROSS_LINKED, Fault.OUTSIDE, Fault.HELD} & set(faults(image))


def test_a_flood_of_problems_is_dammed(image: Image):
    location, _ = image.bitmap_of("data_space", 0)
    counts = decode_bitmap(image.block(location), location).counts.copy()
    counts[7000:15000:2] = 1
    image.put(location, Bitmap(counts).encode(location))
    found = faults(image)
    assert len(found[Fault.COUNT_LEAK]) == 1000
    assert len(found[Fault.MORE]) == 1


def test_bitmap_missing_from_the_index_or_too_many(image: Image):
    root = image.superblock.data_space.bitmap_root
    node = image.node(root)
    image.set_node(root, node.keys[:1], node.values[:1])
    assert Fault.NO_BITMAP in faults(image)
    image.set_node(root, [*node.keys.tolist(), 9], np.append(node.values, node.values[:1]))
    assert {Fault.EXTRA_BITMAP, Fault.CROSS_LINKED} <= set(faults(image))


def test_damaged_bitmap(image: Image):
    location, _ = image.bitmap_of("data_space", 0)
    image.image[location * BLOCK_BYTES + 99] ^= 4
    problem = faults(image)[Fault.UNREADABLE][0]
    assert (problem.place.begin, problem.place.end) == (0, 16320)
