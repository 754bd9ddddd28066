"""Settings of every test run: one thread a process, no network, reproducible examples. Fixtures stay in their files.

Invariant: a test's outcome does not depend on the machine's cores or on earlier runs.
"""

import os

from hypothesis import HealthCheck, settings

# Read by torch and transformers when they are first imported, after this file. setdefault: the command line wins.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Shared machines are slow at times: a deadline would fail tests for the weather. Derandomised: a run is repeatable.
settings.register_profile(
    "argosy", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("argosy")
