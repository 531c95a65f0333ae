"""The earlier name of `bigvision.launchers`: ``python -m bigvision.launching.torchrun`` works for one more version."""

import warnings

from bigvision import launchers

warnings.warn("bigvision.launching is called bigvision.launchers now", FutureWarning, stacklevel=2)
__path__ = launchers.__path__
