"""What came of ranks that were started from here: their result, or the error of the one that failed first."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from bigvision.errors import Exit, Stopped, UserError
from bigvision.launching.rank import RESULT
from bigvision.runtime import RankFailure
from bigvision.training import Result, read_history


def outcome(attempt: Path, done: bool, codes: dict[int, int], interrupted: bool, received: list[int], out: str) -> Result:
    """Return what rank 0 returned, or raise what ended the ranks.

    Args:
        attempt: the folder of their last start, in which each has left what it has to say.
        done: all have ended well.
        codes: their exit codes, as far as they are known.
        interrupted: Ctrl-C has stopped them.
        received: the signals that have.

    Raises:
        UserError: a mistake, with the rank's own words.
        Stopped: a signal, or Ctrl-C, has stopped them, and they have saved.
        KeyboardInterrupt: Ctrl-C has ended them, and there was nothing to save yet, or no time.
        RankFailure: a fault; names the rank and the cause.
    """
    if done:
        result = json.loads((attempt / RESULT).read_text(encoding="utf-8"))
        return Result(result["step"], Path(result["checkpoint"]), result["metrics"], read_history(out))
    said = last_words(attempt)
    for one in said:
        if one["kind"] == "mistake":
            raise UserError(one["words"])
    for one in said:
        if one["kind"] == "stopped":
            raise Stopped(one["name"], one["step"], Path(one["checkpoint"]))
    if interrupted:
        raise KeyboardInterrupt
    if received:
        # As if nothing had held it back: the ranks have ended now.
        os.kill(os.getpid(), received[0])
    raise _fault(said, codes)


def last_words(attempt: Path) -> list[dict[str, Any]]:
    """What the ranks of a start have said at their end, the first one first."""
    said = [json.loads(path.read_text(encoding="utf-8")) for path in attempt.glob("rank-*.json")]
    return sorted(said, key=lambda one: one["time"])


def _fault(said: list[dict[str, Any]], codes: dict[int, int]) -> RankFailure:
    spoke = {one["rank"] for one in said}
    # A rank that is killed says nothing; the others only miss it. They themselves are ended by SIGTERM.
    for number, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM and number not in spoke:
            want = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            return RankFailure(f"rank {number}: killed by {signal.Signals(-code).name}{want}")
    if said:
        # All ranks may say what failed on one, and hardly one after the other.
        about = re.match(r"rank (\d+): ", said[0]["words"])
        first = next((one for one in said if about and one["rank"] == int(about[1])), said[0])
        failure = RankFailure(said[0]["words"] if about else f"rank {first['rank']}: {first['words']}")
        failure.add_note(f"On rank {first['rank']}:\n{first['traceback']}")
        return failure
    for number, code in sorted(codes.items()):
        if code:
            hint = " (a limit of `limits` ran out; its stacks are on the error output)" if code == Exit.HUNG else ""
            hint = " (stopped by a signal before the run began)" if code == Exit.STOPPED else hint
            return RankFailure(f"rank {number}: ended with exit code {code}{hint}")
    return RankFailure("the ranks ended without a result")
