"""Benchmarks are programs, not tests: pytest, which also looks for doctests, leaves this folder alone."""

collect_ignore_glob = ["*.py"]
