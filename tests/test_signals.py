import subprocess
import sys

from bigvision.errors import Exit

HEARD = """
import os, signal, time
from bigvision.signals import SIGNALS
SIGNALS.listen()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
"""
"""As of an import that tries something and passes over whatever comes of it."""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)


def test_a_stop_that_an_import_passes_over_ends_the_process() -> None:
    ended = run(HEARD + "time.sleep(60)")
    assert (ended.returncode, ended.stderr.count("stopped by SIGTERM before the run began")) == (Exit.STOPPED, 1)


def test_who_listens_anew_is_not_ended_by_the_stop_before() -> None:
    again = "SIGNALS.restore()\nSIGNALS.listen()\ntime.sleep(3)"
    assert run(HEARD + again).returncode == Exit.DONE


def test_a_rank_that_has_met_the_others_is_not_ended_at_once() -> None:
    """The run itself agrees on a step: tests/training/test_stopping.py."""
    assert run(HEARD + "SIGNALS.stop_at_once(False)\ntime.sleep(3)").returncode == Exit.DONE
