"""Pools made from XML: both dialects, any order, sharing found again, nonsense refused, and what comes out is clean."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from metadata import (
    BuildReport,
    FileStore,
    Instead,
    MemoryStore,
    MetadataError,
    MetadataFull,
    NotPoolMetadata,
    PoolMetadata,
    RestoreInvalid,
    XmlInvalid,
    recount,
    restore,
)
from metadata.dump import dump
from metadata.node import CAPACITY
from metadata.tree_build import cut_points
from tests.fakes.dump_texts import IMAGES, TWO_DEVICES, device, our_dump, pool, run
from tests.fakes.thin_tools import assert_clean, run_tool, thin_restore


def restored(
    xml: str | bytes, blocks: int = 3000, instead: Instead | None = None
) -> tuple[MemoryStore, BuildReport]:
    store = MemoryStore(blocks)
    report = restore(io.BytesIO(xml if isinstance(xml, bytes) else xml.encode()), store, instead)
    problems = recount(store)
    assert not problems, "\n".join(map(str, problems))
    assert PoolMetadata.open(store).metadata_blocks_allocated == report.metadata_blocks_used
    return store, report


@pytest.mark.parametrize("name", IMAGES)
def test_comes_out_as_it_went_in(name: str):
    again = our_dump(restored(IMAGES[name])[0])
    if name == "mappings out of order" or name == "wrong number of mapped blocks":
        assert again == IMAGES["small with holes"]
    else:
        assert again == IMAGES[name]


@pytest.mark.peer
@pytest.mark.parametrize("name", IMAGES)
def test_foreign_tools_agree_on_it(require_tool, tmp_path: Path, name: str):
    require_tool("thin_restore")
    store, _ = restored(IMAGES[name])
    path, theirs = tmp_path / "ours", tmp_path / "theirs"
    path.write_bytes(store.image)
    thin_restore(IMAGES[name], theirs, blocks=3000)
    assert assert_clean(path) == assert_clean(theirs)


def test_kernel_made_pools_survive_dump_and_restore(kernel_images: Mapping[str, bytes]):
    for name, image in kernel_images.items():
        text = our_dump(MemoryStore(image))
        store, report = restored(text, blocks=max(len(image) // 4096, 1000))
        assert our_dump(store) == text, name
        used = PoolMetadata.open(MemoryStore(image), writable=False).metadata_blocks_allocated
        # What was shared is shared again; leaves are cut elsewhere, so it is not the same number.
        assert report.metadata_blocks_used <= used * 1.25 + 20, name


def test_dump_of_a_metadata_snapshot_needs_the_number_of_data_blocks(kernel_images: Mapping[str, bytes]):
    image = kernel_images["tmeta_with_metadata_snap"]
    text = our_dump(MemoryStore(image), held=True)
    with pytest.raises(RestoreInvalid):
        restore(io.BytesIO(text.encode()), MemoryStore(3000))
    blocks = PoolMetadata.open(MemoryStore(image), writable=False).data_blocks
    store, _ = restored(text, instead=Instead(data_blocks=blocks))
    assert our_dump(store) == our_dump(MemoryStore(image))


@pytest.mark.peer
def test_figures_given_overrule_those_of_the_xml_as_thin_restore_takes_them(require_tool, tmp_path: Path):
    require_tool("thin_restore")
    text = IMAGES["small with holes"]
    store, _ = restored(text, instead=Instead(data_blocks=300_000, transaction_id=41, data_block_sectors=256))
    xml, theirs = tmp_path / "xml", tmp_path / "theirs"
    xml.write_text(text)
    theirs.write_bytes(bytes(3000 * 4096))
    given = ["--transaction-id", "41", "--data-block-size", "256", "--nr-data-blocks", "300000"]
    code, said = run_tool("thin_restore", "-i", xml, "-o", theirs, *given)
    assert code == 0, said
    assert our_dump(store) == run_tool("thin_dump", theirs)[1]
    assert 'transaction="41"' in our_dump(store).splitlines()[0]


def test_a_restored_pool_can_be_used():
    store, _ = restored(IMAGES["six devices naming the same blocks"])
    metadata = PoolMetadata.open(store)
    metadata.create_snapshot(77, 3)
    metadata.remove(0, 0, 500)
    metadata.delete_device(5)
    keys = np.arange(3000, dtype=np.uint64)
    metadata.insert(1, keys, (keys + np.uint64(100_000)) << np.uint64(24))
    metadata.commit()
    assert recount(store) == []


# Sharing


def test_snapshots_share_again_what_they_shared():
    store, report = restored(our_dump(MemoryStore(TWO_DEVICES)), 2000)
    # 70,000 mappings take some 320 leaves; two changed places cost four or so.
    assert report.metadata_blocks_used < 360
    metadata = PoolMetadata.open(store)
    assert metadata.data_counts(0, 200).tolist() == [1] * 200
    assert metadata.usage(1).exclusive_blocks < 2500


def test_equal_devices_are_one_tree():
    runs = [run(0, 0, 50_000)]
    _, one = restored(pool([device(0, 50_000, runs)]))
    _, many = restored(pool([device(number, 50_000, runs) for number in range(100)]))
    assert many.metadata_blocks_used == one.metadata_blocks_used


def test_insertions_shift_leaves_only_for_a_while():
    keys = np.arange(0, 200_000, 2)
    plain = [run(key, key, 1) for key in keys.tolist()]
    shifted = sorted(
        [*plain, run(1, 199_999, 1), run(50_001, 199_997, 1)], key=lambda line: int(line.split('"')[1])
    )
    _, one = restored(pool([device(0, len(plain), plain)]))
    _, two = restored(pool([device(0, len(plain), plain), device(1, len(shifted), shifted)]))
    assert two.metadata_blocks_used - one.metadata_blocks_used < 40


# The 1.x dialect


def test_shared_parts():
    text = pool(
        [
            '  <def name="a">\n' + run(0, 0, 100) + run(200, 300, 1) + "  </def>\n",
            '  <def name="b">\n    <ref name="a"/>\n' + run(300, 400, 2) + "  </def>\n",
            device(1, 0, ['    <ref name="a"/>\n', run(250, 350, 1)]),
            device(2, 0, ['    <ref name="b"/>\n', run(400, 500, 50)]),
        ]
    )
    assert our_dump(restored(text)[0]) == pool(
        [
            device(1, 102, [run(0, 0, 100), run(200, 300, 1), run(250, 350, 1)]),
            device(2, 153, [run(0, 0, 100), run(200, 300, 1), run(300, 400, 2), run(400, 500, 50)]),
        ]
    )


def test_forms_that_thin_dump_does_not_write():
    text = (
        '<?xml version="1.0" encoding="utf-8"?>\n<!-- a comment\n'
        + run(7, 7, 1) * 20
        + "-->\n"
        + pool([device(0, 0, [run(n, n, 1) for n in range(0, 40, 2)] + ["<!-- more -->"] + [run(50, 50, 3)])])
    )
    for changed in (
        text,
        text.replace("\n", "\r\n"),
        text.replace("\n", ""),
        text.replace("    <", "\t<"),
        text.replace('"', "'"),
        text.replace("/>", " />"),
        text.replace('time="0"/>', 'time="00"/>'),
        text.replace(' flags="0" version="2"', ""),
        text.replace(' flags="0"', ' metadata_snap="6" flags="0"'),
    ):
        store, report = restored(changed)
        assert report.mapped_blocks == 23, changed
        assert our_dump(store) == our_dump(restored(text)[0])


@pytest.mark.parametrize("cut", [1, 7, 100, 4096])
def test_pieces_of_any_size(cut: int):
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(cut)

    text = IMAGES["six devices naming the same blocks"]
    store = MemoryStore(3000)
    restore(Dribble(text.encode()), store)
    assert our_dump(store) == text


def test_fields_of_the_superblock_are_kept():
    text = pool([]).replace('uuid=""', 'uuid="0123456789abcdef"').replace('flags="0"', 'flags="1"')
    metadata = PoolMetadata.open(restored(text)[0])
    assert metadata.uuid == b"0123456789abcdef"
    assert metadata.needs_check
    assert (metadata.transaction_id, metadata.time) == (7, 1)


# Refusals

ONE = device(1, 0, [run(0, 0, 10)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no xml",
        "<superblock/>",
        "<html></html>",
        pool([ONE])[:-5],
        pool([ONE]).replace(' time="1"', ""),
        pool([ONE]).replace("dev_id", "id"),
        pool([ONE]).replace('dev_id="1"', 'dev_id="16777216"'),
        pool([ONE]).replace('length="10"', 'length="0"'),
        pool([ONE]).replace('length="10"', 'length="-1"'),
        pool([ONE]).replace('length="10"', 'length="x"'),
        pool([ONE]).replace('length="10"', 'length="18446744073709551626"'),
        pool([ONE])
        .replace('length="10"', 'length="1099511627776"')
        .replace('data_begin="0"', 'data_begin="1"'),
        pool([ONE]).replace('origin_begin="0"', 'origin_begin="18446744073709551610"'),
        pool([ONE]).replace('length="10" time="0"', 'length="10" time="16777216"'),
        pool([run(0, 0, 1)] * 20),
        pool([run(0, 0, 1)]),
        pool(["<device>"] * 2),
        pool([ONE.replace("  <device", "  <thing", 1).replace("</device", "</thing")]),
        pool([device(1, 0, ['<ref name="nothing"/>'])]),
        pool(['<def name="a"></def>'] * 2),
        '<!DOCTYPE x [<!ENTITY a "b">]>' + pool([]),
        pool(
            [
                device(
                    1,
                    0,
                    [
                        run(n, n, 1).replace('time="0"', 'time="0" extra="1"').replace("mapp", "ma0pp")
                        for n in range(20)
                    ],
                )
            ]
        ),
    ],
)
def test_no_dump_of_a_pool(text: str):
    store = MemoryStore(500)
    with pytest.raises(XmlInvalid) as raised:
        restore(io.BytesIO(text.encode()), store)
    assert "line" in str(raised.value)
    with pytest.raises(NotPoolMetadata):
        PoolMetadata.open(store)


def test_lines_are_counted_right():
    text = pool([device(1, 0, [run(n, n, 1) for n in range(0, 200, 2)]), "<wrong/>\n"])
    with pytest.raises(XmlInvalid) as raised:
        restore(io.BytesIO(text.encode()), MemoryStore(500))
    assert raised.value.line == text[: text.index("<wrong")].count("\n") + 1


@pytest.mark.parametrize(
    "devices",
    [
        [ONE, ONE],
        [device(1, 0, [run(0, 0, 10), run(9, 20, 1)])],
        [device(1, 0, [run(5, 0, 1), run(0, 20, 10)])],
        [device(1, 0, [run(0, 199_995, 10)])],
    ],
)
def test_devices_that_contradict_themselves(devices: list[str]):
    store = MemoryStore(500)
    with pytest.raises(RestoreInvalid) as raised:
        restore(io.BytesIO(pool(devices).encode()), store)
    assert raised.value.device_id == 1
    with pytest.raises(NotPoolMetadata):
        PoolMetadata.open(store)


@pytest.mark.parametrize("blocks", [1, 2, 12, 100, 350])
def test_target_too_small(blocks: int):
    store = MemoryStore(blocks)
    with pytest.raises(MetadataFull):
        restore(io.BytesIO(IMAGES["80000 random blocks"].encode()), store)
    with pytest.raises(MetadataError):
        PoolMetadata.open(store)


def test_impossible_size_of_data_blocks():
    with pytest.raises(MetadataError):
        restore(
            io.BytesIO(pool([]).replace('data_block_size="128"', 'data_block_size="100"').encode()),
            MemoryStore(100),
        )


def test_one_range_over_a_huge_data_space():
    """Nobody waits for 2**40 mappings that cannot fit."""
    text = pool([device(1, 0, [run(0, 0, 2**40)])], blocks=2**40)
    with pytest.raises(MetadataFull):
        restore(io.BytesIO(text.encode()), MemoryStore(1000))


def test_file_as_target(tmp_path: Path):
    path = tmp_path / "metadata"
    path.write_bytes(bytes(1000 * 4096))
    store = FileStore(path, writable=True)
    restore(io.BytesIO(IMAGES["300 devices"].encode()), store)
    written: list[str] = []
    dump(store, written.append)
    assert "".join(written) == IMAGES["300 devices"]
    store.close()


# Cutting


@given(
    st.sampled_from(sorted(CAPACITY.values())),
    st.integers(0, 3000),
    st.integers(0, 2**32),
    st.lists(st.integers(0, 3000), max_size=5),
)
def test_leaves_have_allowed_sizes_wherever_the_entries_were_cut(
    capacity: int, count: int, seed: int, pieces: list[int]
):
    keys = np.sort(np.random.default_rng(seed).choice(2**40, count, replace=False)).astype(np.uint64)
    cuts = cut_points(keys, capacity, last=True)
    sizes = np.diff([0, *cuts])
    assert sum(sizes) == count
    if len(sizes) > 1:
        assert sizes.min() >= capacity // 3
    assert not len(sizes) or sizes.max() <= capacity
    done, again = 0, []
    for end in sorted({piece for piece in pieces if piece < count}):
        found = cut_points(keys[done:end], capacity, last=False)
        again += [done + cut for cut in found]
        done = again[-1] if again else 0
    again += [done + cut for cut in cut_points(keys[done:], capacity, last=True)]
    assert again == cuts


MAPPINGS = st.dictionaries(
    st.integers(0, 400) | st.integers(2**64 - 5, 2**64 - 1),
    st.tuples(st.integers(0, 300), st.integers(0, 2)),
    max_size=80,
)


@given(st.dictionaries(st.integers(0, 2**24 - 1), MAPPINGS, max_size=4))
def test_any_devices(devices: dict[int, dict[int, tuple[int, int]]]):
    text = pool(
        [
            device(
                number,
                len(mappings),
                [run(key, data, 1, time) for key, (data, time) in mappings.items()],
                snapshotted=3,  # any of them may be shared
            )
            for number, mappings in devices.items()
        ],
        time=3,
        blocks=301,
    )
    store, _ = restored(text, 300)
    metadata = PoolMetadata.open(store)
    for number, mappings in devices.items():
        found = {}
        for keys, values in metadata.mappings(number):
            found.update(zip(keys.tolist(), values.tolist(), strict=True))
        assert found == {key: data << 24 | time for key, (data, time) in mappings.items()}
