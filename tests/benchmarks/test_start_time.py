"""The measurement of starts: times of lines, crashes, what comes of the times; and that the peers' programs resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.start_time import ACCURACY, FIRST, OF_TIMM, OWN, ROOT, Program, table, write_digits

SCRIPT = """
import sys, time
print("recipe: one")
time.sleep(0.2)
print("step 12 of 30: loss 2.3, 4.2 s after the start", flush=True)
print("step 30/30  loss 0.5  accuracy 97.22%  680 images/s", flush=True)
sys.exit("out of luck") if sys.argv[1:] else time.sleep(60)
"""


def test_a_line_is_timed_and_a_program_killed() -> None:
    program = Program([sys.executable, "-c", SCRIPT])
    first, _ = program.wait_for(FIRST)
    second, found = program.wait_for(ACCURACY)
    assert 0.2 < first <= second < 30 and found[1] == "97.22"
    assert program.kill() >= program.begun + second and program.process.returncode == -9
    line = "Test: [   5/5]  Time: 0.050 (0.101)  Loss:   0.284 ( 0.353)  Acc@1:  90.000 ( 91.111)  Acc@5: 100.000 ( 99.722)"
    timm = Program([sys.executable, "-c", f"import sys; print({line!r}, file=sys.stderr)"], errors=subprocess.STDOUT)
    assert timm.wait_for(OF_TIMM)[1][1] == "91.111"
    ended = Program([sys.executable, "-c", SCRIPT, "ends"])
    ended.wait_for(ACCURACY)
    with pytest.raises(RuntimeError, match=r"without a line like .*out of luck"):
        ended.wait_for(ACCURACY)


def test_targets_are_ratios_of_times_in_the_same_rounds() -> None:
    drift = [1.0, 3.0, 2.0]
    first = {OWN: 0.5, "accelerate": 1.0, "fabric": 0.5, "accelerate (again)": 1.0}
    crash = {OWN: 0.55, "accelerate": 1.0, "fabric": 1.0, "accelerate (again)": 1.0}
    times = {
        what: {name: [second * factor for factor in drift] for name, second in seconds.items()}
        for what, seconds in (("first step", first), ("after a crash", crash))
    }
    text, targets = table("start", times, {"cores": 2})
    assert [(target.figure, target.met) for target in targets] == [(0.5, True), (1.0, False), (0.55, True), (0.55, True)]
    assert "| accelerate (again) | 2 (" in text and "3 rounds; cores 2." in text


@pytest.mark.long
@pytest.mark.parametrize("name", ["accelerate", "timm"])
def test_the_peers_resume_from_their_last_epoch(name: str, tmp_path: Path) -> None:
    write_digits(tmp_path / "all.npz")
    np.savez(tmp_path / "some.npz", **{key: values[:128] for key, values in np.load(tmp_path / "all.npz").items()})
    command = [sys.executable, str(ROOT / "benchmarks/digits_loops.py"), name, "--data", str(tmp_path / "some.npz")]
    for epochs, first in ((1, "step 1 of 2"), (2, "step 3 of 4")):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out"), "--epochs", str(epochs)], capture_output=True, text=True, check=True
        )
        assert done.stdout.count("step ") >= 2 and first in done.stdout, done.stdout
