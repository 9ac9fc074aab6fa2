"""A process that ends where an executor should start."""

if __name__ == "__main__":
    raise SystemExit(3)
