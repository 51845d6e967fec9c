"""JAX runs on one thread in these tests, as torch does. It reads NPROC, not OMP_NUM_THREADS, when it is first used."""

import os

os.environ.setdefault("NPROC", "1")
