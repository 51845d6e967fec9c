"""What stands on disk: the identity, the plan, parts and their commits, statistics, runs."""
