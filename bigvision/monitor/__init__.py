"""Progress, metrics.jsonl and what the user reads at the end."""

from bigvision.monitor.monitor import Monitor
from bigvision.monitor.stragglers import Own

__all__ = ["Monitor", "Own"]
