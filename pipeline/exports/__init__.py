"""Caches written again in the formats of trainers."""
