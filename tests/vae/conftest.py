"""Settings of JAX for these tests: one thread, as torch has, and faster compilation of slower code.

JAX reads NPROC, not OMP_NUM_THREADS, and both variables only when it is first used.
"""

import os

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
