"""Snapshots in object storage: what lies there, how it comes there and back, and how it is cleaned up.

In: the format of a store and everything that reads or writes one, over a handful of operations on objects
(`objects.py`). Out: pools and devices (the rest of `thinpool`), which reach in here through two small interfaces: a
source of blocks to push and a place to put pulled blocks.

docs/object-storage.md describes the format, and the protocol by which pushes and the collector run at once.
"""
