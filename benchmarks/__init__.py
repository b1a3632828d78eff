"""Benchmarks: speed and memory beside other packages, and the faithfulness of every setting."""
