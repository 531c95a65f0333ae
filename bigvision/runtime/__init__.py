"""Who am I: launcher environments, process groups, device and mesh."""

from bigvision.runtime.collectives import RankFailure, all_or_none, from_main, gather_json
from bigvision.runtime.environment import Identity
from bigvision.runtime.identity import identify
from bigvision.runtime.process import Runtime, choose_device, start

__all__ = [
    "Identity",
    "RankFailure",
    "Runtime",
    "all_or_none",
    "choose_device",
    "from_main",
    "gather_json",
    "identify",
    "start",
]
