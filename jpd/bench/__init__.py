"""Benchmarks of the whole engine, and what they are made of: workloads, a client, metrics."""
