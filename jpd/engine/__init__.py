"""The engine: plan -> launch -> commit, one step in flight. Scheduling imports no jax."""
