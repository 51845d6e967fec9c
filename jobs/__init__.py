"""The jobs that a user runs: the command line, one module per job, and the only module that imports Ray."""
