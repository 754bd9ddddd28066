"""Settings of every test run: one thread a process, no network, reproducible examples. Fixtures stay in their files.

Invariant: a test's outcome does not depend on the machine's cores or on earlier runs.
"""

import os
import signal

from hypothesis import HealthCheck, settings

# Read by torch and transformers when they are first imported, after this file. setdefault: the command line wins.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts a program in the background makes it ignore Ctrl-C, and so all that it starts: tests of Ctrl-C
# would wait for nothing. With Python's own handler in place, what a test starts has the system's default again.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared machines are slow at times: a deadline would fail tests for the weather. Derandomised: a run is repeatable.
settings.register_profile(
    "argosy", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("argosy")
