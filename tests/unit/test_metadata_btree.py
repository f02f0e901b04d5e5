"""B-trees against dictionaries, with the structure checked after every change; copy-on-write by reference counts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from metadata.block_cache import BlockCache
from metadata.btree import find_leaf, has_entries, last_key, leaves, lookup
from metadata.btree_edit import TreeEditor
from metadata.btree_insert import TreeInserter, piece_sizes
from metadata.btree_remove import TreeRemover
from metadata.checksum import BlockKind
from metadata.counts import CountTable
from metadata.errors import BlockDamaged, Damage
from metadata.layout import KEY_LIMIT, VALUE_TYPES
from metadata.node import make_internal
from metadata.store import MemoryStore
from metadata.transaction import Transaction
from metadata.tree_kind import TreeKind
from tests.fakes.metadata_pools import span, u64


class CountingKind(TreeKind):
    """A tree whose values are counted like data blocks, in a dictionary."""

    def __init__(self, value_bytes=8):
        super().__init__("test", value_bytes)
        object.__setattr__(self, "held", {})

    __slots__ = ("held",)

    def add(self, values, step):
        for value in values.tolist():
            self.held[value] = self.held.get(value, 0) + step
            assert self.held[value] >= 0

    def share(self, values):
        self.add(values, 1)

    def release(self, values):
        self.add(values, -1)

    def exchange(self, old, new):
        self.add(new, 1)
        self.add(old, -1)

    def adopt(self, values):
        self.add(values, 1)


class Forest:
    """Trees in one transaction that never commits, each with a dictionary that says what it must hold."""

    def __init__(self, blocks=30000):
        empty = np.zeros(16320, np.uint32)
        self.counts = CountTable("metadata", blocks, lambda chunk: empty)
        self.transaction = Transaction(BlockCache(MemoryStore(1)), self.counts)
        self.transaction.allocate()  # block 0 stands for the superblock
        self.kind = CountingKind()
        self.editor = TreeEditor(self.transaction, self.kind)
        self.roots = [self.editor.create()]
        self.models: list[dict[int, int]] = [{}]

    def insert(self, tree, keys, values):
        inserter = TreeInserter(self.editor)
        fresh = sum(key not in self.models[tree] for key in keys.tolist())
        self.roots[tree] = inserter.insert(self.roots[tree], keys, values)
        assert inserter.added == fresh
        self.models[tree].update(zip(keys.tolist(), values.tolist(), strict=True))

    def remove(self, tree, begin, end):
        gone = [key for key in self.models[tree] if begin <= key < end]
        remover = TreeRemover(self.editor)
        self.roots[tree] = remover.remove_range(self.roots[tree], begin, end)
        assert remover.removed == len(gone)
        for key in gone:
            del self.models[tree][key]

    def pick(self, tree, keys):
        remover = TreeRemover(self.editor)
        self.roots[tree] = remover.remove_keys(self.roots[tree], keys)
        for key in keys.tolist():
            self.models[tree].pop(key, None)

    def copy(self, tree):
        self.transaction.reference(u64(self.roots[tree]))
        self.roots.append(self.roots[tree])
        self.models.append(dict(self.models[tree]))

    def drop(self, tree):
        self.editor.drop(self.roots.pop(tree))
        self.models.pop(tree)

    def check(self):
        """Contents, order, fill, equal depth, and both kinds of counts recounted from scratch."""
        places: dict[int, int] = {0: 1}
        values: dict[int, int] = {}
        for root, model in zip(self.roots, self.models, strict=True):
            depths: set[int] = set()
            assert dict(self._walk(root, 0, 0, KEY_LIMIT, depths, places, values)) == model
            assert len(depths) == 1
        used = {block: count for block, count in enumerate(self.counts.span(0, 30000).tolist()) if count}
        assert used == places
        assert {value: count for value, count in self.kind.held.items() if count} == values

    def _walk(self, block, depth, low, high, depths, places, values):
        first = block not in places
        places[block] = places.get(block, 0) + 1
        node = self.transaction.node(block)
        keys = node.keys.tolist()
        assert keys == sorted(set(keys))
        if keys:
            assert low <= keys[0]
            assert keys[-1] < high
        assert depth == 0 or len(keys) >= node.minimum
        assert len(keys) <= node.capacity
        if node.leaf:
            depths.add(depth)
            if first:
                for value in node.values.tolist():
                    values[value] = values.get(value, 0) + 1
            return list(zip(keys, node.values.tolist(), strict=True))
        assert len(keys) >= 2
        entries = []
        for i, child in enumerate(node.values.tolist()):
            bound = keys[i + 1] if i + 1 < len(keys) else high
            # Under a node met before, children are not places of their own.
            seen = places if first else {**places}
            entries += self._walk(
                child, depth + 1, keys[i], bound, depths, seen, values if first else dict(values)
            )
        return entries

    def height(self, tree):
        node, levels = self.transaction.node(self.roots[tree]), 1
        while not node.leaf:
            node, levels = self.transaction.node(int(node.values[0])), levels + 1
        return levels

    def fills(self, tree):
        return [len(keys) for keys, _ in leaves(self.transaction, 8, self.roots[tree])]


@pytest.fixture
def forest():
    return Forest()


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("capacity", [126, 168, 252, 336])
def test_piece_sizes(ascending, capacity):
    for count in range(5 * capacity):
        sizes = piece_sizes(count, capacity, ascending=ascending)
        assert sum(sizes) == count
        assert max(sizes) <= capacity
        assert len(sizes) == 1 or min(sizes) >= capacity // 3


def test_empty_tree(forest):
    root = forest.roots[0]
    assert lookup(forest.transaction, 8, root, 5) is None
    assert last_key(forest.transaction, 8, root) is None
    assert list(leaves(forest.transaction, 8, root)) == []
    leaf = find_leaf(forest.transaction, 8, root, 5)
    assert (leaf.begin, leaf.end) == (0, KEY_LIMIT)
    forest.remove(0, 0, KEY_LIMIT)
    forest.check()


def test_extreme_keys(forest):
    forest.insert(0, u64(0, 2**63, 2**64 - 1), u64(1, 2, 3))
    for key, value in ((0, 1), (2**63, 2), (2**64 - 1, 3)):
        assert lookup(forest.transaction, 8, forest.roots[0], key) == value
    assert has_entries(forest.transaction, 8, forest.roots[0], 2**64 - 1, KEY_LIMIT)
    assert not has_entries(forest.transaction, 8, forest.roots[0], 1, 2**63)
    forest.remove(0, 2**63 + 1, KEY_LIMIT)
    forest.check()


def test_bulk_ascending_load_fills_leaves(forest):
    forest.insert(0, span(0, 252 * 10), span(0, 252 * 10))
    assert forest.fills(0) == [252] * 10
    forest.check()


@pytest.mark.parametrize("step", [1, 7, 100, 300])
def test_small_appends_fill_leaves_too(forest, step):
    for first in range(0, 4000, step):
        forest.insert(0, span(first, step), span(first, step))
    fills = forest.fills(0)
    assert sum(fills) / len(fills) > 220
    forest.check()


def test_three_levels_grow_and_collapse(forest):
    keys = span(0, 80000) * 3
    forest.insert(0, keys, keys)
    assert forest.height(0) == 3
    forest.check()
    rng = np.random.default_rng(5)
    scattered = np.unique(rng.integers(0, 240000, 20000)).astype(np.uint64)
    forest.insert(0, scattered, scattered + 1000000)
    forest.check()
    forest.remove(0, 500, 230000)
    forest.check()
    assert forest.height(0) <= 2
    forest.remove(0, 0, KEY_LIMIT)
    assert forest.height(0) == 1
    forest.check()


def test_removing_one_by_one_keeps_nodes_filled(forest):
    forest.insert(0, span(0, 3000), span(0, 3000))
    order = list(range(3000))
    random.Random(3).shuffle(order)
    for i, key in enumerate(order):
        forest.remove(0, key, key + 1)
        if i % 100 == 0:
            forest.check()
    forest.check()


def test_overwriting_changes_no_keys(forest):
    forest.insert(0, span(0, 1000), span(0, 1000))
    forest.insert(0, span(300, 100), span(5000, 100))
    forest.check()


def test_shared_leaf_is_copied_once_and_values_counted_again(forest):
    forest.insert(0, span(0, 100), span(0, 100))
    forest.copy(0)
    assert forest.kind.held[7] == 1
    forest.insert(1, u64(50), u64(900))
    assert forest.roots[0] != forest.roots[1]
    assert forest.kind.held[7] == 2
    assert forest.kind.held[50] == 1
    forest.check()


def test_shadowing_a_shared_root_references_its_children(forest):
    forest.insert(0, span(0, 2000), span(0, 2000))
    children = forest.transaction.node(forest.roots[0]).values.tolist()
    forest.copy(0)
    forest.insert(1, u64(0), u64(7777))
    counts = [forest.counts.get(child) for child in children]
    assert counts == [1] + [2] * (len(children) - 1)
    forest.check()


def test_collapse_of_a_shared_root(forest):
    """Shadowing the shared root makes its child shared; collapsing onto it must keep that count."""
    forest.insert(0, span(0, 400), span(0, 400))
    assert forest.height(0) == 2
    forest.copy(0)
    forest.remove(1, 100, KEY_LIMIT)
    assert forest.height(1) == 1
    forest.check()
    forest.drop(0)
    forest.check()


def test_dropping_a_subtree_that_others_share(forest):
    forest.insert(0, span(0, 60000), span(0, 60000))
    forest.copy(0)
    forest.remove(1, 1000, 59000)
    forest.check()
    forest.remove(0, 0, KEY_LIMIT)
    forest.check()


def test_picking_keys(forest):
    forest.insert(0, span(0, 20000), span(0, 20000))
    forest.copy(0)
    forest.pick(0, span(0, 10000) * 2)
    forest.pick(1, u64(3, 30000))
    forest.check()
    forest.pick(0, span(0, 20000))
    forest.check()


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_on_sharing_trees(forest, seed):
    generator = random.Random(seed)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        tree = generator.randrange(len(forest.roots))
        choice = generator.random()
        if choice < 0.45:
            count = generator.choice([1, 5, 100, 2000])
            keys = np.unique(rng.integers(0, 12000, count)).astype(np.uint64)
            forest.insert(tree, keys, rng.integers(0, 2**40, len(keys)).astype(np.uint64))
        elif choice < 0.7:
            begin = generator.randrange(12000)
            forest.remove(tree, begin, begin + generator.choice([1, 50, 3000, 20000]))
        elif choice < 0.8:
            forest.pick(tree, np.unique(rng.integers(0, 12000, 200)).astype(np.uint64))
        elif choice < 0.92 and len(forest.roots) < 5:
            forest.copy(tree)
        elif len(forest.roots) > 1:
            forest.drop(tree)
    forest.check()
    while forest.roots:
        forest.drop(0)
    forest.check()
    assert forest.transaction.free_blocks == 30000 - 1


def test_node_of_another_tree_is_refused(forest):
    other = TreeEditor(forest.transaction, TreeKind("small", 4)).create()
    with pytest.raises(BlockDamaged) as caught:
        lookup(forest.transaction, 8, other, 1)
    assert caught.value.damage is Damage.VALUE_SIZE


def test_a_loop_is_noticed(forest):
    block = forest.transaction.allocate()
    forest.transaction.put(block, make_internal(u64(0, 1), u64(block, block)))
    for read in (lookup, find_leaf):
        with pytest.raises(BlockDamaged) as caught:
            read(forest.transaction, 8, block, 0)
        assert caught.value.damage is Damage.TOO_DEEP
    with pytest.raises(BlockDamaged):
        list(leaves(forest.transaction, 8, block))


def test_node_cache_is_bounded_and_verified():
    store = MemoryStore(20)
    for block in range(20):
        store.write(block, make_internal(u64(1, 2), u64(3, 4)).encode(block))
    cache = BlockCache(store, 4)
    nodes = [cache.node(block) for block in range(20)]
    assert cache.node(19) is nodes[19]
    assert cache.node(0) is not nodes[0]
    with pytest.raises(BlockDamaged) as caught:
        cache.raw(20, BlockKind.NODE)
    assert caught.value.damage is Damage.OUTSIDE


@pytest.mark.parametrize("size", VALUE_TYPES)
def test_every_value_type(size):
    forest = Forest()
    editor = TreeEditor(forest.transaction, TreeKind("plain", size))
    values = np.zeros(1000, VALUE_TYPES[size])
    values.view(np.uint8)[:] = np.random.default_rng(1).integers(0, 256, 1000 * size)
    order = np.random.default_rng(2).permutation(1000)
    root = editor.create()
    for batch in np.split(order, 10):
        batch.sort()
        root = TreeInserter(editor).insert(root, batch.astype(np.uint64), values[batch])
    root = TreeRemover(editor).remove_range(root, 10, 500)
    found = np.concatenate([part for _, part in leaves(forest.transaction, size, root)])
    assert found.tobytes() == np.concatenate((values[:10], values[500:])).tobytes()
