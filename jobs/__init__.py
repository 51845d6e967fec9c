"""The jobs that a user runs: the command line, one module per job, and the only package that imports Ray."""
