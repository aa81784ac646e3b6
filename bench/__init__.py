"""Benchmarks of flowrl_kernels, each behind a correctness gate: python -m bench NAME."""
