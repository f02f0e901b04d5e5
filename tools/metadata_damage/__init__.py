"""Random damage of a pool's metadata: what check finds, what repair saves, beside Debian's tools."""
