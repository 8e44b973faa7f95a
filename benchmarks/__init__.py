"""Benchmarks: one file a claim; `python -m benchmarks.NAME` writes benchmarks/results/NAME.json."""
