"""What the start of a server has built is no garbage to look for while requests wait."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import server_cost

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
PROGRAM = """
import gc
import sys
from argosy.config import EngineConfig
from argosy.server.run import serve
from argosy.server.settings import ServerConfig
from benchmarks.played_engine import start_played_engine

def say(line: str) -> None:
    if line.startswith("listening"):
        print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)

serve(EngineConfig(model="argosy-tiny", device="cpu"), ServerConfig(port=0), version="1", say=say,
      start_process=start_played_engine)
"""


def test_collections_leave_out_what_the_start_built() -> None:
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        num_kept, num_looked_at = map(int, process.stdout.readline().split())
        assert num_kept > 50_000 and num_looked_at < num_kept / 20
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0


LOUD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
sys.stderr.write("listening on http://h:1\\n" + "answer\\n" * 100_000)
sys.stderr.flush()
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_the_log_of_a_measured_server_is_read(tmp_path: Path) -> None:
    """Nobody else does, and a full pipe would stop it."""
    mark = tmp_path / "written"
    with server_cost.started([sys.executable, "-c", LOUD, str(mark)]) as (url, process):
        assert url == "h:1"
        while not mark.exists():
            assert process.poll() is None
    assert process.returncode == 0
