"""Benchmarks and studies; README.md tells how to run them."""
