"""Thin-provisioned block devices and copy-on-write snapshots in user space, exported over NBD.

Importing the package loads nothing heavy; the engine is `thinpool.pool`, the command line `thinpool.cli`.
"""

__version__ = "0.1.0"
