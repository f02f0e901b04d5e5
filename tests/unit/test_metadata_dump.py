"""Our dump against thin_dump, byte for byte, on pools that thin_restore made and on pools of our own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata import (
    BlockDamaged,
    DeviceIncomplete,
    FileStore,
    MemoryStore,
    NoMetadataSnapshot,
    NotPoolMetadata,
    PoolMetadata,
    Severity,
    format_pool,
    recount,
)
from metadata.dump_format import HUMAN_READABLE
from metadata.runs import RunMerger
from tests.fakes.dump_texts import IMAGES, TWO_DEVICES, our_dump, run
from tests.fakes.metadata_edits import Image
from tests.fakes.thin_tools import assert_clean, run_tool, thin_restore


@pytest.mark.peer
@pytest.mark.parametrize("name", IMAGES)
def test_images_made_by_thin_restore(require_tool, tmp_path: Path, name: str):
    require_tool("thin_restore")
    path = tmp_path / "metadata"
    thin_restore(IMAGES[name], path, blocks=3000)
    store = FileStore(path, writable=False)
    assert our_dump(store) == assert_clean(path)
    assert our_dump(store, form=HUMAN_READABLE) == run_tool("thin_dump", "-f", "human_readable", path)[1]
    # thin_restore leaves a scratch block in its figures; counts and trees are right all the same.
    assert all(problem.severity is Severity.HINT for problem in recount(store))
    store.close()


@pytest.mark.peer
def test_choice_of_devices_and_no_mappings(require_tool, tmp_path: Path):
    require_tool("thin_dump")
    path = tmp_path / "metadata"
    thin_restore(IMAGES["six devices naming the same blocks"], path, blocks=3000)
    store = FileStore(path, writable=False)
    for option, ours in (
        (["--dev-id", "3"], {"devices": {3}}),
        (["--skip-mappings"], {"mappings": False}),
        (["--format", "human_readable"], {"form": HUMAN_READABLE}),
    ):
        code, said = run_tool("thin_dump", *option, path)
        assert code == 0
        assert our_dump(store, **ours) == said
    store.close()


def test_runs_go_on_over_leaves_and_shared_leaves():
    lines = our_dump(MemoryStore(TWO_DEVICES)).splitlines(keepends=True)
    first = lines.index(run(0, 0, 70_000))
    assert lines[first + 1] == "  </device>\n"
    assert lines[first + 3 :] == [
        run(0, 0, 500),
        run(500, 80_500, 2, 1),
        run(502, 502, 39_498),
        run(40_000, 90_000, 1, 1),
        run(40_001, 40_001, 29_999),
        "  </device>\n",
        "</superblock>\n",
    ]


def test_text_kept_for_shared_leaves_makes_no_difference():
    store = MemoryStore(3000)
    format_pool(store, data_block_sectors=128, data_blocks=100_000)
    metadata = PoolMetadata.open(store)
    metadata.create_device(0)
    random = np.random.default_rng(3)
    keys = np.sort(random.choice(2**40, 30_000, replace=False)).astype(np.uint64)
    metadata.insert(0, keys, random.permutation(30_000).astype(np.uint64) << np.uint64(24))
    for number in range(1, 5):
        metadata.create_snapshot(number, number - 1)
        start = number * 3000
        blocks = np.arange(30_000 + 50 * number, 30_050 + 50 * number, dtype=np.uint64)
        metadata.insert(number, keys[start : start + 50], blocks << np.uint64(24) | np.uint64(number))
    metadata.commit()
    with_memory = our_dump(store)
    assert our_dump(store, kept_characters=0) == with_memory
    assert with_memory.count("_mapping ") == 150_000


def test_what_was_not_committed_is_not_dumped():
    store = MemoryStore(TWO_DEVICES)
    metadata = PoolMetadata.open(store)
    before = our_dump(metadata)
    metadata.delete_device(2)
    assert our_dump(metadata) == before
    metadata.commit()
    assert our_dump(metadata) != before


# Faults


def spoil_leaf(image: Image) -> None:
    image.image[image.leaves(image.root_of(1))[7] * 4096 + 50] ^= 1


def drop_record(image: Image) -> None:
    node = image.node(image.superblock.details_root)
    image.set_node(image.superblock.details_root, node.keys[:1], node.values[:1])


def drop_tree(image: Image) -> None:
    node = image.node(image.superblock.mapping_root)
    image.set_node(image.superblock.mapping_root, node.keys[:1], node.values[:1])


def mix_levels(image: Image) -> None:
    root = image.root_of(1)
    image.edit_values(root, lambda values: values.__setitem__(0, image.leaves(root)[0]))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (spoil_leaf, BlockDamaged),
        (drop_record, DeviceIncomplete),
        (drop_tree, DeviceIncomplete),
        (mix_levels, BlockDamaged),
        (lambda image: image.put(0, bytes(4096)), NotPoolMetadata),
    ],
)
def test_damage_ends_the_dump(damage: Callable[[Image], None], error: type[Exception]):
    image = Image(TWO_DEVICES)
    damage(image)
    with pytest.raises(error):
        our_dump(image)


def test_no_metadata_snapshot():
    with pytest.raises(NoMetadataSnapshot):
        our_dump(MemoryStore(TWO_DEVICES), held=True)


# Runs


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(-1, 3), st.integers(0, 1)), max_size=60),
    st.lists(st.integers(1, 60), max_size=8),
)
def test_runs_are_those_of_a_loop(steps: list[tuple[int, int, int]], cuts: list[int]):
    mappings = []
    key, block = 0, 50
    for key_step, block_step, time in steps:
        key, block = key + key_step, block + block_step
        mappings.append((key, block, time))
    expected: list[list[int]] = []
    for key, block, time in mappings:
        last = expected[-1] if expected else None
        if last and last[0] + last[2] == key and last[1] + last[2] == block and last[3] == time:
            last[2] += 1
        else:
            expected.append([key, block, 1, time])

    merger = RunMerger()
    found: list[list[int]] = []
    bounds = sorted({0, len(mappings), *(cut for cut in cuts if cut < len(mappings))})
    parts = [mappings[start:stop] for start, stop in pairwise(bounds)]
    for part in [*parts, []]:
        keys = np.array([key for key, _, _ in part], np.uint64)
        values = np.array([block << 24 | time for _, block, time in part], np.uint64)
        found += columns(merger.add(keys, values))
    found += columns(merger.finish())
    assert found == expected
    assert columns(merger.finish()) == []


def columns(runs) -> list[list[int]]:
    return np.array([runs.begins, runs.data_begins, runs.lengths, runs.times]).T.tolist()
