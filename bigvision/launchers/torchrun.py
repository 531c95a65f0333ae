"""torchrun with the exit codes of its ranks: ``python -m bigvision.launchers.torchrun TORCHRUN_ARGUMENTS``.

torchrun itself ends with 1 whatever a rank ended with, so a scheduler could not tell a mistake from a run that is to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bigvision.errors import Exit


def main(arguments: Sequence[str]) -> int:
    """Start ranks and wait for them; returns the exit code of the first that failed (1 where a signal killed it).

    The variables PET_* are read as torchrun reads them.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else Exit.FAULT
    except SignalException:
        # The ranks got a signal to stop, and have ended.
        return Exit.STOPPED
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
