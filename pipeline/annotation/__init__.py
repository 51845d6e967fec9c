"""Add columns to a cache that exists: from a table, or from its sources as they are now."""
