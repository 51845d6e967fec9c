"""Maintenance of a cache: status, verify, retry."""
