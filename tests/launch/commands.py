"""Commands that start ranks, run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]


def start(command: list[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's folder to its end."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)


def launch(command: list[str], timeout: float = 600) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = start(command, timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def deepspeed(*arguments: str, port: int = 0) -> list[str]:
    """DeepSpeed's launcher, at a port of its own."""
    return [str(BIN / "deepspeed"), "--master_port", str(port or free_port()), *arguments]
