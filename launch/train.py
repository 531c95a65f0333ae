"""The one entry for every launcher: the same program as ``bigvision train``."""

import sys

from bigvision.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
