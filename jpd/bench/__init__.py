"""Offline benchmarks of the whole engine, as `jpd bench` runs them."""
