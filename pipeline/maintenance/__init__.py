"""What keeps a cache in order: status, verify, retry."""
