"""Estimate what a job will find, take and write, from a small part of its sources. Nothing is written."""
