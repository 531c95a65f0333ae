"""Who am I: launcher environments, process groups, device and mesh."""

from bigvision.runtime.identity import Identity, identify
from bigvision.runtime.process import Runtime, choose_device, deterministic, operations_named, start
from bigvision.runtime.rendezvous import (
    RankFailure,
    all_or_none,
    from_main,
    gather_json,
    lacks_shared_memory,
    warn_of_shared_memory,
)
from bigvision.runtime.watchdog import Watchdog, collective_timeout

__all__ = [
    "Identity",
    "RankFailure",
    "Runtime",
    "Watchdog",
    "all_or_none",
    "choose_device",
    "collective_timeout",
    "deterministic",
    "from_main",
    "gather_json",
    "identify",
    "lacks_shared_memory",
    "operations_named",
    "start",
    "warn_of_shared_memory",
]
