"""Other systems, measured. Each module here runs in a process of its own and prints JSON rows."""
