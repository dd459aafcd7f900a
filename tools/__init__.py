"""Benchmarks and checks, started by hand."""
