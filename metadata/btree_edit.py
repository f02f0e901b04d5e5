"""Copy-on-write of tree nodes, creating and dropping whole trees.

In: what insertion and removal share. Out: those two (btree_insert, btree_remove).

Reference counting (dm-transaction-manager.c, dm-btree.c): the count of a block is the number of places that point
at it. Shadowing a node moves the reference by which we came to it to the copy. If others still point at the
original, original and copy both hold its children, so each child gains one; otherwise the copy inherits them.
"""

from __future__ import annotations

from .btree import count_entries, read_node
from .node import Node, empty_leaf
from .transaction import Transaction
from .tree_kind import TreeKind


class TreeEditor:
    """Changes to trees of one kind inside one transaction."""

    def __init__(self, transaction: Transaction, kind: TreeKind) -> None:
        self.transaction = transaction
        self.kind = kind

    def node(self, location: int, depth: int = 0) -> Node:
        """A node, checked to belong to this kind of tree. Raises BlockDamaged."""
        return read_node(self.transaction, location, self.kind.value_bytes, depth)

    def create(self) -> int:
        """A new empty tree; returns its root."""
        return self.transaction.allocate_with(empty_leaf(self.kind.value_bytes))

    def shadow(self, location: int, depth: int = 0) -> tuple[int, Node]:
        """Place for the changed content of a node, and its present content (not yet put there)."""
        node = self.node(location, depth)
        place, shared = self.transaction.replace(location)
        if place != location:
            # The copy must be readable even if the caller ends up not changing it.
            self.transaction.put(place, node)
        if shared:
            if node.leaf:
                self.kind.share(node.values)
            else:
                self.transaction.reference(node.values)
        return place, node

    def drop(self, root: int, *, counting: bool = False, depth: int = 0) -> int:
        """Remove one reference to a (sub)tree, and everything only it reached.

        Shared subtrees are not read, unless `counting` asks for the exact number of entries that went out of
        reach of this tree, which is returned (0 otherwise).
        """
        transaction = self.transaction
        entries = 0
        if transaction.is_shared(root):
            if counting:
                entries = count_entries(transaction, self.kind.value_bytes, root)
        else:
            node = self.node(root, depth)
            if node.leaf:
                self.kind.release(node.values)
                entries = len(node.keys)
            else:
                for child in node.values.tolist():
                    entries += self.drop(child, counting=counting, depth=depth + 1)
        transaction.unreference(root)
        return entries
