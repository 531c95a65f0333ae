"""When worker processes need the main module, and hiding it from them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import spawn
from typing import Any

import numpy as np
import pytest
import torch

from bigvision.data import MapStyle, transform
from bigvision.data.workers import main_hidden, needs_main


class Listed:
    classes = ("a", "b")

    def __init__(self, *parts: Any) -> None:
        self.parts, self.targets = parts, [0, 1]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros((4, 4, 3), dtype=np.uint8), index


def of_main(value: Any) -> Any:
    """*value*, a class or a function, as if it were defined in the main module."""
    value.__module__ = "__main__"
    return value


def test_something_of_the_main_module_is_found_wherever_it_is() -> None:
    own = of_main(type("Own", (Listed,), {}))
    change = of_main(lambda pixels: pixels)
    boxed = np.empty(1, dtype=object)
    boxed[0] = own()
    parts = [own(), own, change, functools.partial(change, 3), {"a": [change]}, own().__len__, boxed]
    for part in parts:
        assert needs_main(part), part
        assert needs_main((transform("photo", 8, train=True), MapStyle(Listed(part)))), part
    assert needs_main(MapStyle(own()))


def test_what_is_found_by_importing_needs_no_main_module() -> None:
    large = torch.zeros(3)
    parts = ["__main__", large, np.zeros(3), functools.partial(Listed, 3), len, {"a": [b"__main__"]}]
    for part in parts:
        assert not needs_main(MapStyle(Listed(part))), part
    assert not large.is_shared()
    # It cannot be sent at all, which is said elsewhere.
    assert not needs_main(lambda: 3)


def test_the_main_module_is_hidden_and_comes_back() -> None:
    main = sys.modules["__main__"]
    before = dict(vars(main))
    with pytest.raises(KeyError):
        with main_hidden(), main_hidden():
            data = spawn.get_preparation_data("worker")
            assert "init_main_from_name" not in data and "init_main_from_path" not in data
            raise KeyError
    after = dict(vars(main))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


SERVER = """
from bigvision.data.workers import fork_server, worker_context
fork_server()
if __name__ == "__main__":
    from multiprocessing import forkserver
    fork_server()
    worker = worker_context(False).Process(target=__import__("os")._exit, args=(3,))
    worker.start()
    worker.join()
    server = forkserver._forkserver._forkserver_pid
    print(worker.exitcode, server, open(f"/proc/{server}/cmdline").read())
"""


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info >= (3, 14), reason="elsewhere the server is a new interpreter")
def test_the_server_of_workers_is_forked_and_ends_with_its_program() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, check=True)
    code, server, command = done.stdout.split(" ", 2)
    assert code == "3" and "fork_server()" in command, "a fork has the command line of its program"
    with suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(int(server), 0)
            time.sleep(0.05)
        raise AssertionError("the server outlives its program")
    assert not done.stderr, done.stderr
