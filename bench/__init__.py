"""Benchmarks: each prints this machine's limit, what was measured against it, and one line of JSON."""
