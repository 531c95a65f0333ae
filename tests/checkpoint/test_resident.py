"""Resident memory of a rank while it saves and restores."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from bigvision import checkpoint
from bigvision.checkpoint import Retention, Saver
from bigvision.fragments import Fragment
from bigvision.runtime import start
from tests.checkpoint.test_format import DOCUMENTS
from tests.distributed import run_ranks

MEGA = 1 << 20
HELD = 256 * MEGA
SLACK = 64 * MEGA
"""The most that threads' buffers, plans and JSON may take; the promise is four times as much."""


class Peak:
    """The most anonymous memory that was resident, over that at the beginning, in bytes."""

    def __enter__(self) -> Peak:
        self.before = self.over = 0
        self.before = self._now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.002):
            self.over = max(self.over, self._now() - self.before)

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peaks(out: Path, writer: str) -> dict[str, int]:
    found = {}
    with start("cpu") as runtime:
        size = HELD // 4 // 8
        fragments = []
        for number in range(8):
            begin = runtime.rank * size
            values = torch.ones(size)
            fragments.append(Fragment("model", f"t{number}", (size * runtime.world_size,), begin, values, (0, 1)))
        for background in (False, True):
            saver = Saver(out, 10**10, Retention(1), background=background, writer=writer)  # type: ignore[arg-type]
            with Peak() as peak:
                saver.save(1, fragments, dict(DOCUMENTS))
                saver.wait()
            found["background" if background else "foreground"] = peak.over
            del saver
        opened = checkpoint.find("auto", out, True, print)
        assert opened is not None
        with Peak() as peak:
            opened.restore(fragments)
        found["restore"] = peak.over
    return found


@pytest.mark.parametrize("writer", ["direct", "owner"])
def test_memory_is_that_of_the_copy_and_no_more(tmp_path: Path, writer: str) -> None:
    for found in run_ranks(peaks, 2, tmp_path, writer):
        assert found["foreground"] < SLACK, found
        assert 0.9 * HELD < found["background"] < HELD + SLACK, found
        assert found["restore"] < SLACK, found
