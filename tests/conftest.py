"""Shared set-up of the tests: one thread per worker, so that results do not depend on how many run beside."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
