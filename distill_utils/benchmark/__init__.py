"""Benchmark of the main operations on this machine: `bash sh/benchmark.sh`."""
