"""A cache on disk: its identity and plan, parts and their commits, statistics, runs."""
