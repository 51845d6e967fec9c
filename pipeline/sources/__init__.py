"""List the sources, compare them with the plan, and divide them into units."""
