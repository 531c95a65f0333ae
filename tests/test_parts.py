"""``make test-all`` in parts: what has passed is not run again, what has failed or was stopped is, and all of it is printed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import parts
from tests.parts import main

STATE = "import os\ndef test_state():\n    assert os.environ['STATE'] == 'good'\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STATE", "bad")
    for name, text in (("a/test_one.py", "def test_one(): pass\n"), ("a/test_two.py", STATE), ("b/test_none.py", "")):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).write_text(text)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def test_a_run_that_was_stopped_goes_on_with_what_has_not_passed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["tests/a/test_one.py", "tests/a/test_two.py", "tests/b/test_none.py"]

    def printed() -> str:
        return capsys.readouterr().out

    assert main(["tests/a/test_one.py"], project) == 0
    text = printed()
    assert "1 of 1 parts to run" in text and "passed: 1 parts" in text and "left: 0 parts" in text

    with monkeypatch.context() as stopping:
        stopping.setattr(parts.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        assert main([], project) == 130
    text = printed()
    assert "2 of 3 parts to run" in text and "stopped; the same command goes on" in text
    assert text.endswith("left: 2 parts\n  tests/a/test_two.py\n  tests/b/test_none.py\n")

    assert main([], project) == 1
    text = printed()
    assert "tests/a/test_one.py  passed" not in text and "tests/a/test_two.py  FAILED, see" in text
    assert "passed: 2 parts" in text and "failed: 1 parts" in text
    log = project / "build/tests/logs/tests.a.test_two.py.txt"
    assert f"tests/a/test_two.py  ({log})" in text and "assert 'bad' == 'good'" in log.read_text()

    monkeypatch.setenv("STATE", "good")
    assert main([], project) == 0
    assert "1 of 3 parts to run" in printed()
    assert main(["tests/none"], project) == 2

    # Another content, and other arguments, begin anew.
    (project / "tests/a/helper.py").write_text("")
    assert main([], project) == 0 and "3 of 3 parts to run" in printed()
    assert main(["tests/a", "--", "-k", "two"], project) == 0 and "2 of 2 parts to run" in printed()
    assert names == parts.find(project, [])
