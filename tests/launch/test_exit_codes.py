"""What each launcher ends with when its ranks end with a code: the table of docs/launching.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.launch.commands import BIN, ROOT, TORCHRUN, deepspeed, start
from tests.launch.test_same_losses import mpirun

CODES = (0, 1, 2, 75, 124)
LAUNCHERS = {
    "torchrun": lambda: [*TORCHRUN, "--nproc-per-node", "2"],
    "deepspeed": lambda: deepspeed("--num_gpus", "2"),
    "accelerate launch": lambda: [str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/fsdp_cpu.yaml"],
    "mpirun": lambda: [*mpirun(2), sys.executable],
}


def table() -> dict[str, list[int]]:
    """What docs/launching.md says of each launcher."""
    text = (ROOT / "docs" / "launching.md").read_text()
    rows = re.findall(r"^\| `([a-z ]+)` \|((?: [0-9]+ \|){5})", text, flags=re.MULTILINE)
    return {name: [int(code) for code in re.findall("[0-9]+", codes)] for name, codes in rows}


@pytest.mark.long
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_ends_with_the_code_that_the_documents_say(name: str, code: int, tmp_path: Path) -> None:
    program = tmp_path / "end.py"
    program.write_text(f"import sys\nsys.exit({code})\n")
    done = start([*LAUNCHERS[name](), str(program)], timeout=120)
    assert done.returncode == table()[name][CODES.index(code)], done.stdout + done.stderr
