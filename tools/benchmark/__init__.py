"""Benchmarks of thinpool beside other NBD servers; run through ``tools/bench``.

In: the matrix of workloads, servers and clients, alternated in one run; reports. Out: tests of correctness.
"""
