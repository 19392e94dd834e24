"""Times and memory on one GPU beside other methods, offline, with random weights.

Run ``python -m benchmarks.gpu``; docs/benchmarks_gpu.md has the results, and says how to carry it
to a machine without a network.
"""
