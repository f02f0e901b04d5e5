"""Repair: what is intact comes out complete, what is lost is named, lost nodes and roots are found where that is certain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from metadata import Fault, Known, MemoryStore, Outcome, RepairReport, SuperblockLost, recount, repair
from tests.fakes.dump_texts import our_dump
from tests.fakes.metadata_edits import Image
from tests.unit.test_metadata_recount import POOL

WHOLE = our_dump(MemoryStore(POOL))
BLOCKS = 600


def repaired(change: Callable[[Image], object], known: Known | None = None) -> tuple[RepairReport, str]:
    image = Image(POOL)
    change(image)
    before = bytes(image.image)
    target = MemoryStore(BLOCKS)
    report = repair(image, target, known)
    assert bytes(image.image) == before
    assert recount(target) == []
    return report, our_dump(target)


def outcomes(report: RepairReport) -> dict[int, Outcome]:
    return {each.device: each.outcome for each in report.devices}


def zero(location: Callable[[Image], int]) -> Callable[[Image], None]:
    return lambda image: image.put(location(image), bytes(4096))


def space_map_blocks(image: Image) -> None:
    data, metadata = image.superblock.data_space, image.superblock.metadata_space
    for location in (data.bitmap_root, data.overflow_root, metadata.bitmap_root, metadata.overflow_root):
        image.put(location, bytes(4096))


def mappings_for_roots(image: Image) -> None:
    """A leaf of mappings, sound by itself, where the list of roots was."""
    leaf = image.node(image.leaves(image.root_of(1))[0])
    image.set_node(image.superblock.mapping_root, keys=leaf.keys, values=leaf.values)


def no_records(image: Image) -> None:
    image.put(image.superblock.details_root, bytes(4096))


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: None,
        mappings_for_roots,
        space_map_blocks,
        zero(lambda image: image.root_of(1)),
        zero(lambda image: image.root_of(2)),
        zero(lambda image: image.root_of(3)),
        zero(lambda image: image.superblock.mapping_root),
        zero(lambda image: image.superblock.held_root),
    ],
    ids=[
        "nothing",
        "mappings for roots",
        "space maps",
        "root of 1",
        "root of 2",
        "root of 3",
        "list of roots",
        "metadata snapshot",
    ],
)
def test_nothing_is_lost(damage: Callable[[Image], None]):
    report, text = repaired(damage)
    assert text == WHOLE
    assert report.lossless


def test_a_leaf_is_lost_to_those_that_share_it():
    report, text = repaired(zero(lambda image: image.leaves(image.root_of(1))[5]))
    assert not report.lossless
    assert {number for number, outcome in outcomes(report).items() if outcome is Outcome.DAMAGED} == {1, 2, 3}
    for each in report.devices[:3]:
        ((begin, end),) = each.lost
        assert each.recorded_blocks is not None
        assert each.mapped_blocks == each.recorded_blocks - (end - begin)
    assert text.count("<device") == 5


def test_records_are_made_anew():
    report, text = repaired(zero(lambda image: image.superblock.details_root))
    assert report.lossless
    mapped = [line for line in WHOLE.splitlines() if "_mapping" in line]
    assert [line for line in text.splitlines() if "_mapping" in line] == mapped
    assert any("record" in remark for remark in report.remarks)


def test_without_records_nothing_is_called_complete_that_lost_a_child_others_have():
    """The data's counts stay as they are; the metadata's tell."""

    def cut(image: Image) -> None:
        no_records(image)
        root = image.node(image.root_of(2))
        image.set_node(image.root_of(2), keys=root.keys[:-1], values=root.values[:-1])

    whole, _ = repaired(no_records)
    assert whole.lossless
    report, _ = repaired(cut)
    assert not report.lossless
    assert outcomes(report)[2] is Outcome.SUSPECT


def test_without_records_a_device_that_the_list_lost_comes_back():
    def cut(image: Image) -> None:
        no_records(image)
        listed = image.node(image.superblock.mapping_root)
        kept = listed.keys != 3
        image.set_node(image.superblock.mapping_root, keys=listed.keys[kept], values=listed.values[kept])

    whole, _ = repaired(no_records)
    report, _ = repaired(cut)
    mapped = sorted(each.mapped_blocks for each in whole.devices)
    assert sorted(each.mapped_blocks for each in report.devices) == mapped
    assert not report.lossless


def test_a_record_that_is_older_than_the_snapshots_is_not_carried_over():
    """An old copy of the records, sound by itself: what came after it would be written into by the kernel."""

    def turn_back(image: Image) -> None:
        image.edit_values(
            image.superblock.details_root, lambda values: values["snapshotted_time"].__setitem__(0, 0)
        )

    image = Image(POOL)
    turn_back(image)
    assert {problem.fault for problem in recount(image)} == {Fault.SHARED_AS_OWN}
    report, text = repaired(turn_back)
    assert text == WHOLE.replace('snap_time="2"', 'snap_time="1"', 1)
    assert report.lossless
    assert any("device 1" in remark and "last snapshot" in remark for remark in report.remarks)


def test_both_lists_of_devices_lost():
    def both(image: Image) -> None:
        superblock = image.superblock
        image.put(superblock.mapping_root, bytes(4096))
        image.put(superblock.details_root, bytes(4096))

    report, _ = repaired(both)
    assert {each.device: each.mapped_blocks for each in report.devices if each.mapped_blocks} == {
        1: 3007,
        2: 3000,
        3: 3000,
    }
    assert set(outcomes(report).values()) == {Outcome.GUESSED}
    assert not report.lossless


def test_superblock_lost():
    image = Image(POOL)
    image.put(0, bytes(4096))
    # The metadata snapshot has a copy that knows the size of data blocks, not that of the data.
    report, text = repaired(zero(lambda _: 0), Known(data_blocks=20_000, transaction_id=0))
    assert text == WHOLE
    assert set(outcomes(report).values()) == {Outcome.GUESSED}  # of which moment, nothing says
    held = Image(POOL).superblock.held_root

    def both(image: Image) -> None:
        image.put(0, bytes(4096))
        image.put(held, bytes(4096))

    with pytest.raises(SuperblockLost):
        repaired(both)
    _, text = repaired(both, Known(data_block_sectors=128, data_blocks=20_000, transaction_id=0))
    assert text == WHOLE
    report, text = repaired(both, Known(data_block_sectors=128, transaction_id=0))
    assert text == WHOLE.replace('nr_data_blocks="20000"', 'nr_data_blocks="6007"')
    assert any("6007 blocks" in remark for remark in report.remarks)


def test_mappings_outside_the_data_are_dropped():
    def point_outside(image: Image) -> None:
        leaf = image.leaves(image.root_of(1))[-1]
        image.edit_values(leaf, lambda values: values.__setitem__(-1, 20_000 << 24))

    report, _ = repaired(point_outside)
    assert outcomes(report)[1] is Outcome.DAMAGED
    assert report.devices[0].lost == ((5006, 5007),)


def test_a_node_of_another_place_is_not_taken_for_the_one_that_was_there():
    def swap(image: Image) -> None:
        first, second = image.leaves(image.root_of(1))[3:5]
        nodes = image.node(first), image.node(second)
        image.set_node(first, nodes[1].keys, nodes[1].values)
        image.set_node(second, nodes[0].keys, nodes[0].values)

    report, _ = repaired(swap)
    assert [outcomes(report)[number] for number in (1, 2, 3)] == [Outcome.DAMAGED] * 3
    assert len(report.devices[0].lost) == 1
