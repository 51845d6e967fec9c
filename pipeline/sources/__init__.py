"""Which inputs there are: sources listed, compared with the plan, and cut into units."""
