"""The driver of a run on Ray's workers: the same program as ``bigvision ray``."""

import sys

from bigvision.signals import SIGNALS

if __name__ == "__main__":
    # Before what takes seconds to import: a scheduler may ask to stop at any time.
    SIGNALS.listen()
    from bigvision.cli import main

    sys.exit(main(["ray", *sys.argv[1:]]))
