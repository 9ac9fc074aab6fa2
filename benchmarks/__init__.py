"""Benchmarks: one file answers one question, run as ``python -m benchmarks.NAME``."""
