"""What a person runs: the command line, one module a job, and the only place that imports Ray."""
