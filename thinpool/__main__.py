"""`python -m thinpool`: the same as the `thinpool` command."""

from thinpool.cli import main

main()
