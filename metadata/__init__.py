"""The dm-thin metadata format and its algorithms."""
