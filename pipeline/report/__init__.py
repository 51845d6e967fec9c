"""The report of a cache: findings about what looks wrong, and one HTML page with them and with all that is known."""
